-- ARGV: name object bytes charge ttl_ms grace_ms. What was written is now the blob of this name; what was, goes.
-- Returns 1; 0 if it took too long.
local name, object = ARGV[1], ARGV[2]
local entry = ARGV[3] .. ' ' .. ARGV[4] .. ' ' .. object
local reserved, old = redis.call('HGET', WRITING, object), redis.call('HGET', STORED, name)
if not reserved then return old == entry and 1 or 0 end
if old then forget(name, old, ARGV[6]) end
redis.call('HDEL', WRITING, object)
redis.call('ZREM', TRASH, object)
redis.call('INCRBY', STORED_BYTES, ARGV[4] - reserved)
redis.call('HSET', STORED, name, entry)
redis.call('ZADD', STORED_ENDS, now() + ARGV[5], name)
return 1
