-- ARGV: worker (ref attempt)... Claimed jobs that were never begun go back to where they waited; nothing is held
-- against them. Returns the refs of those that were this worker's.
local found = {}
for i = 2, #ARGV, 2 do
    local ref, key = ARGV[i], JOB(ARGV[i])
    local job = redis.call('HMGET', key, 'status', 'worker', 'attempt', 'alone')
    if job[1] == 'running' and job[2] == ARGV[1] and job[3] == ARGV[i + 1] then
        become(ref, 'queued')
        redis.call('HINCRBY', key, 'spared', 1)
        redis.call('HDEL', key, 'started_ms')
        if not job[4] then redis.call('HDEL', key, 'alone') end
        table.insert(found, ref)
    end
end
return found
