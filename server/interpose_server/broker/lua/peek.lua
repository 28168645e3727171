-- ARGV: model most running_per_user. Flat (ref, footprint, alone, created_ms), fairest first.
local found = {}
for _, ref in ipairs(fair(ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]))) do
    local job = redis.call('HMGET', JOB(ref), 'footprint', 'alone', 'created_ms')
    table.insert(found, ref)
    table.insert(found, job[1])
    table.insert(found, job[2] or '')
    table.insert(found, job[3])
end
return found
