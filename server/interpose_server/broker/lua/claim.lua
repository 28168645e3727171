-- ARGV: model worker lease_ms ref... Each that still waits becomes this worker's; its hash comes back.
local claimed = {}
for i = 4, #ARGV do
    local job = claim(ARGV[i], ARGV[1], ARGV[2], tonumber(ARGV[3]))
    if job then table.insert(claimed, job) end
end
return claimed
