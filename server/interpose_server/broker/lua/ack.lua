-- ARGV: ref ttl_ms. An ended job whose owner has everything is kept only a little longer.
local status = redis.call('HGET', JOB(ARGV[1]), 'status')
if not status or next(WAYS[status]) then return 0 end
local at = now() + tonumber(ARGV[2])
local was = tonumber(redis.call('ZSCORE', EXPIRY, ARGV[1]) or at)
redis.call('ZADD', EXPIRY, math.min(at, was), ARGV[1])
return 1
