-- ARGV: object charge cap within_ms. Charge for an object that is to be written within that time. Returns 1; 0 if
-- that would be more than the cap.
if redis.call('HEXISTS', WRITING, ARGV[1]) == 1 then return 1 end
if tonumber(redis.call('GET', STORED_BYTES) or 0) + ARGV[2] > tonumber(ARGV[3]) then return 0 end
redis.call('INCRBY', STORED_BYTES, ARGV[2])
redis.call('HSET', WRITING, ARGV[1], ARGV[2])
redis.call('ZADD', TRASH, now() + ARGV[4], ARGV[1])
return 1
