-- ARGV: worker max_attempts problem ttl_ms. Leases that ended (or all of one worker and its lanes, if named) go back to the
-- queue, or fail for good. Returns the refs, each with what became of it.
local worker, most = ARGV[1], tonumber(ARGV[2])
local refs
if worker == '' then
    refs = redis.call('ZRANGEBYSCORE', LEASES, '-inf', now(), 'LIMIT', 0, 1000)
else
    refs = redis.call('ZRANGE', LEASES, 0, -1)
end
-- Several workers of one copy lease as its name, its name+1, its name+2, ...
local function its(name)
    return name == worker or string.sub(name or '', 1, #worker + 1) == worker .. '+'
end
local found = {}
for _, ref in ipairs(refs) do
    local job = redis.call('HMGET', JOB(ref), 'status', 'worker', 'attempt', 'spared')
    if job[1] ~= 'running' then
        redis.call('ZREM', LEASES, ref)
    elseif worker == '' or its(job[2]) then
        local over = tonumber(job[3]) - tonumber(job[4] or 0) >= most
        if over then become(ref, 'failed', ARGV[3], tonumber(ARGV[4])) else become(ref, 'queued') end
        table.insert(found, ref)
        table.insert(found, over and 'failed' or 'queued')
    end
end
return found
