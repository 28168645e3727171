-- ARGV: problem ttl_ms. Forgets ended jobs whose time is over; fails those that waited too long. Returns the
-- refs forgotten, each with the names of its blobs.
local time, ttl, gone = now(), tonumber(ARGV[2]), {}
for _, ref in ipairs(redis.call('ZRANGEBYSCORE', EXPIRY, '-inf', time, 'LIMIT', 0, 500)) do
    local job = redis.call('HMGET', JOB(ref), 'status', 'user', 'id')
    if job[1] == 'queued' then
        become(ref, 'failed', ARGV[1], ttl)
    elseif job[1] == 'running' then
        redis.call('ZADD', EXPIRY, time + ttl, ref)
    else
        table.insert(gone, {ref, redis.call('LRANGE', BLOBS(ref), 0, -1)})
        redis.call('DEL', JOB(ref), EVENTS(ref), BLOBS(ref))
        redis.call('ZREM', EXPIRY, ref)
        if job[2] then redis.call('ZREM', JOBS(job[2]), job[3]) end
        wake(ref)
    end
end
return gone
