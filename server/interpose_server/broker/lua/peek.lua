-- ARGV: model most running_per_user worker lease_ms copy silent_ms. Two lists: flat (ref, footprint, alone, created_ms) of those
-- who may run next, fairest first; and, with a worker's name, the hash of the only one, which is this worker's then.
-- `copy`: of the model, which runs them; jobs are left out that it serves another revision than, and another doesn't.
local refs = fair(ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), left_to_others(ARGV[1], ARGV[6], tonumber(ARGV[7])))
if #refs == 1 and ARGV[4] ~= '' then
    return {{}, {claim(refs[1], ARGV[1], ARGV[4], tonumber(ARGV[5]))}}
end
local found = {}
for _, ref in ipairs(refs) do
    local job = redis.call('HMGET', JOB(ref), 'footprint', 'alone', 'created_ms')
    table.insert(found, ref)
    table.insert(found, job[1])
    table.insert(found, job[2] or '')
    table.insert(found, job[3])
end
return {found, {}}
