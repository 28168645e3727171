-- ARGV: model worker state silent_ms failure problem ttl_ms from. A copy of a model says what it is doing. Returns
-- whether it may; and the refs of the jobs that ended with `problem`, if nothing is left that could run them.
-- `failure`: the model's from now on, '' for what it is. `problem`: '' if those who wait go on waiting. `from`: the
-- state the copy must be in so far, '' for any.
local model, worker, state, time = ARGV[1], ARGV[2], ARGV[3], now()
local states, heard = STATES(model), HEARD(model)
local old = redis.call('HGET', states, worker)
if old and not MODEL_WAYS[old][state] then return {0, {}} end
if ARGV[8] ~= '' and old ~= ARGV[8] then return {0, {}} end
redis.call('SADD', MODELS, model)
for _, other in ipairs(redis.call('ZRANGEBYSCORE', heard, '-inf', time - 86400000)) do
    redis.call('ZREM', heard, other)
    redis.call('HDEL', states, other)
    redis.call('HDEL', SERVED(model), other)
end
if state == 'stopped' then
    redis.call('ZREM', heard, worker)
    redis.call('HDEL', states, worker)
    redis.call('HDEL', SERVED(model), worker)
    return {1, {}}
end
redis.call('SREM', RETIRED, model)
redis.call('ZADD', heard, time, worker)
redis.call('HSET', states, worker, state)
if state == 'loading' then redis.call('HDEL', SERVED(model), worker) end
if state == 'ready' then
    redis.call('HDEL', MODEL(model), 'failure', 'wish_ms', 'evict')
    if old ~= 'ready' then redis.call('HSET', MODEL(model), 'ready_ms', time) end
end
if ARGV[5] ~= '' then redis.call('HSET', MODEL(model), 'failure', ARGV[5]) end
return {1, ARGV[6] == '' and {} or give_up(model, ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[4]))}
