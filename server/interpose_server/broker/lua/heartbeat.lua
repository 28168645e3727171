-- ARGV: worker lease_ms (ref attempt)... Extends the leases still held; returns the refs of those that are not.
local lost, ends = {}, now() + tonumber(ARGV[2])
for i = 3, #ARGV, 2 do
    local job = redis.call('HMGET', JOB(ARGV[i]), 'status', 'worker', 'attempt')
    if job[1] == 'running' and job[2] == ARGV[1] and job[3] == ARGV[i + 1] then
        redis.call('ZADD', LEASES, ends, ARGV[i])
    else
        table.insert(lost, ARGV[i])
    end
end
return lost
