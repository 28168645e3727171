-- ARGV: grace_ms again_ms most. Forget blobs past their time. Returns how many that were, the bytes freed, and objects
-- to be deleted; nobody else is told of those before again_ms.
local time, freed = now(), 0
local ended = redis.call('ZRANGEBYSCORE', STORED_ENDS, '-inf', time, 'LIMIT', 0, ARGV[3])
for _, name in ipairs(ended) do
    local entry = redis.call('HGET', STORED, name)
    freed = freed + entry:match('%d+')
    forget(name, entry, ARGV[1])
end
local due = redis.call('ZRANGEBYSCORE', TRASH, '-inf', time, 'LIMIT', 0, ARGV[3])
for _, object in ipairs(due) do
    local reserved = redis.call('HGET', WRITING, object)
    if reserved then
        redis.call('HDEL', WRITING, object)
        redis.call('DECRBY', STORED_BYTES, reserved)
    end
    redis.call('ZADD', TRASH, time + ARGV[2], object)
end
return {#ended, freed, due}
