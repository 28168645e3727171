-- ARGV: model worker batches jobs busy_s only. A copy is alive, and has run so much since it last said so; one that has
-- said its last word is not heard. `only`: the state it must be in for this to count, '' for any. Returns when something
-- was heard of it before this, and after it; 0 never.
local model, worker = ARGV[1], ARGV[2]
local before = redis.call('ZSCORE', HEARD(model), worker)
local state = redis.call('HGET', STATES(model), worker)
if state and (ARGV[6] == '' or ARGV[6] == state) then redis.call('ZADD', HEARD(model), now(), worker) end
if tonumber(ARGV[3]) + tonumber(ARGV[4]) + tonumber(ARGV[5]) > 0 then
    redis.call('HINCRBY', MODEL(model), 'batches', ARGV[3])
    redis.call('HINCRBY', MODEL(model), 'jobs', ARGV[4])
    redis.call('HINCRBYFLOAT', MODEL(model), 'busy_s', ARGV[5])
end
return {tonumber(before or 0), tonumber(redis.call('ZSCORE', HEARD(model), worker) or 0)}
