-- ARGV: model silent_ms. Forgets a model that was taken out of the catalogue, unless it has jobs or copies; a job for
-- it that is handed in after that is refused. Returns whether it did.
local model = ARGV[1]
local entry = redis.call('HGET', SPECS, model)
if not entry or not cjson.decode(entry).removed then return 0 end
local clock = redis.call('HMGET', CLOCK(model), '/depth', '/running')
if tonumber(clock[1] or 0) > 0 or tonumber(clock[2] or 0) > 0 then return 0 end
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', HEARD(model), now() - ARGV[2], '+inf')) do
    if redis.call('HEXISTS', STATES(model), worker) == 1 then return 0 end
end
redis.call('SADD', RETIRED, model)
redis.call('SREM', MODELS, model)
redis.call('DEL', MODEL(model), STATES(model), HEARD(model), SERVED(model), TALLY(model))
redis.call('HDEL', SPECS, model)
redis.call('INCR', SPECS_CHANGED)
return 1
