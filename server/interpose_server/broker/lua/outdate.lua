-- ARGV: model silent_ms. A model's next copy will serve something else: unless a copy is there, which sees to it, no more
-- is accepted of what was recorded against the last.
local model, silence = ARGV[1], tonumber(ARGV[2])
for _, worker in ipairs(redis.call('HKEYS', STATES(model))) do
    if able(model, worker, silence) then return end
end
local served = redis.call('HGET', MODEL(model), 'served')
if served then redis.call('HSET', MODEL(model), 'closed', served) end
