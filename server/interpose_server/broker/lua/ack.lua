-- ARGV: ref ttl_ms. An ended job whose owner has everything is kept only a little longer. Returns the names of its
-- blobs, which nobody needs any more.
local status = redis.call('HGET', JOB(ARGV[1]), 'status')
if not status or next(WAYS[status]) then return {} end
local at = now() + tonumber(ARGV[2])
local was = tonumber(redis.call('ZSCORE', EXPIRY, ARGV[1]) or at)
redis.call('ZADD', EXPIRY, math.min(at, was), ARGV[1])
local blobs = redis.call('LRANGE', BLOBS(ARGV[1]), 0, -1)
redis.call('DEL', BLOBS(ARGV[1]))
return blobs
