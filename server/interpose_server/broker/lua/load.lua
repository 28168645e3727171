-- ARGV: model. What its users ask of it: jobs waiting, jobs running, when the first of those waiting was handed in
-- (0: none waits), when it was last of use (0: never).
local model = ARGV[1]
local clock = redis.call('HMGET', CLOCK(model), '/depth', '/running', '/used')
local oldest = 0
for _, user in ipairs(redis.call('ZRANGE', USERS(model), 0, -1)) do
    -- Each user's first in line is the one that has waited longest, but for priorities.
    local ref = redis.call('ZRANGE', QUEUE(model, user), 0, 0)[1]
    local created = ref and tonumber(redis.call('HGET', JOB(ref), 'created_ms'))
    if created and (oldest == 0 or created < oldest) then oldest = created end
end
return {math.max(tonumber(clock[1] or 0), 0), math.max(tonumber(clock[2] or 0), 0), oldest, tonumber(clock[3] or 0)}
