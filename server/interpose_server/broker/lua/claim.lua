-- ARGV: model worker lease_ms ref... Each that still waits becomes this worker's; its hash comes back.
local model, worker, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local claimed = {}
for i = 4, #ARGV do
    local ref = ARGV[i]
    local job = redis.call('HMGET', JOB(ref), 'status', 'model', 'user')
    if job[1] == 'queued' and job[2] == model then
        local tag = tonumber(redis.call('ZSCORE', USERS(model), job[3]) or 0)
        local clock = tonumber(redis.call('HGET', CLOCK(model), '/now') or 0)
        if tag > clock then redis.call('HSET', CLOCK(model), '/now', tag) end
        become(ref, 'running')
        redis.call('HSET', JOB(ref), 'worker', worker)
        redis.call('ZADD', LEASES, now() + lease, ref)
        table.insert(claimed, redis.call('HGETALL', JOB(ref)))
    end
end
return claimed
