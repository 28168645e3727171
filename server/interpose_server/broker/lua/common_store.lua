-- For the scripts that keep the index of a bucket. An entry is "bytes charge object".

local function object_of(entry) return entry and entry:match('%d+ %d+ (.*)') end

local function forget(name, entry, grace)
    redis.call('HDEL', STORED, name)
    redis.call('ZREM', STORED_ENDS, name)
    redis.call('DECRBY', STORED_BYTES, entry:match('%d+ (%d+)'))
    redis.call('ZADD', TRASH, now() + grace, object_of(entry))
end
