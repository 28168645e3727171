-- ARGV: model worker silent_ms. Whether a model counts as serving what no copy serves that is left, as all that are or
-- load serve what this one does.
local model, worker, silence = ARGV[1], ARGV[2], tonumber(ARGV[3])
local own, current = redis.call('HGET', SERVED(model), worker), redis.call('HGET', MODEL(model), 'served')
if not own or not current or own == current then return 0 end
if redis.call('HGET', STATES(model), worker) ~= 'ready' then return 0 end
for _, other in ipairs(redis.call('HKEYS', STATES(model))) do
    if redis.call('HGET', SERVED(model), other) ~= own and able(model, other, silence) then return 0 end
end
return 1
