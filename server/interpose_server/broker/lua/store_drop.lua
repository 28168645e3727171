-- ARGV: grace_ms object... Objects that won't be finished are to be deleted, and count no longer.
for i = 2, #ARGV do
    local reserved = redis.call('HGET', WRITING, ARGV[i])
    if reserved then
        redis.call('HDEL', WRITING, ARGV[i])
        redis.call('DECRBY', STORED_BYTES, reserved)
        redis.call('ZADD', TRASH, now() + ARGV[1], ARGV[i])
    end
end
