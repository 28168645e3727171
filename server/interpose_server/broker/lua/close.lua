-- ARGV: model worker silent_ms replaced. A copy is to go. Where others serve what it serves, it drains at once, and 0
-- comes back. Else what was recorded against that is for it alone to run: with `replaced` no more of it is accepted, if
-- the model's next copy won't serve it; and 1 comes back.
local model, worker, silence = ARGV[1], ARGV[2], tonumber(ARGV[3])
local served = map(redis.call('HGETALL', SERVED(model)))
local own, state = served[worker], redis.call('HGET', STATES(model), worker)
local current = redis.call('HGET', MODEL(model), 'served')
if state ~= 'ready' then return 0 end
local alone = own and (ARGV[4] == '1' or (current and current ~= own))
for other, revision in pairs(served) do
    if other ~= worker and revision == own and able(model, other, silence) then alone = false end
end
if not alone then
    redis.call('HSET', STATES(model), worker, 'draining')
    return 0
end
if current == own then redis.call('HSET', MODEL(model), 'closed', own) end
return 1
