-- ARGV: ref worker attempt first outcome problem seconds ttl_ms lease_ms (kind body data blob)...
-- Events of a running attempt, and its end if `outcome` isn't ''. Returns whether the lease is held.
-- A caller who lost the answer sends again: events are counted, so none is appended twice.
local ref, key = ARGV[1], JOB(ARGV[1])
local job = map(redis.call('HGETALL', key))
if job.status ~= 'running' or job.worker ~= ARGV[2] or job.attempt ~= ARGV[3] then
    if job.last == ARGV[2] .. '/' .. ARGV[3] then return 1 end
    return 0
end
local index, applied, bytes = tonumber(ARGV[4]), tonumber(job.applied), 0
for i = 10, #ARGV, 4 do
    if index >= applied then
        emit(ref, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
        if ARGV[i + 3] ~= '' then redis.call('RPUSH', BLOBS(ref), ARGV[i + 3]) end
    end
    index = index + 1
end
redis.call('HSET', key, 'applied', math.max(index, applied))
redis.call('ZADD', LEASES, now() + tonumber(ARGV[9]), ref)
if ARGV[5] ~= '' then
    local seconds = tonumber(ARGV[7])
    local clock, user = CLOCK(job.model), job.user
    local time = redis.call('HINCRBYFLOAT', clock, user, seconds)
    local was = tonumber(redis.call('HGET', clock, user .. '/job') or seconds)
    redis.call('HSET', clock, user .. '/job', 0.8 * was + 0.2 * seconds)
    if redis.call('ZSCORE', USERS(job.model), user) then
        redis.call('ZINCRBY', USERS(job.model), seconds, user)
        redis.call('HSET', clock, user, redis.call('ZSCORE', USERS(job.model), user))
    else
        local floor = tonumber(redis.call('HGET', clock, '/now') or 0)
        redis.call('HSET', clock, user, math.max(tonumber(time), floor + seconds))
    end
    redis.call('HINCRBY', USAGE(user), 'jobs', 1)
    redis.call('HINCRBYFLOAT', USAGE(user), 'seconds', seconds)
    redis.call('HSET', key, 'last', ARGV[2] .. '/' .. ARGV[3])
    become(ref, ARGV[5], ARGV[6], tonumber(ARGV[8]))
else
    wake(ref)
end
return 1
