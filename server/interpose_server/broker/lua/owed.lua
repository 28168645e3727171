-- ARGV: model worker. Whether jobs wait or run that were recorded against what a copy serves.
local model = ARGV[1]
local own = redis.call('HGET', SERVED(model), ARGV[2])
local function its(ref)
    local job = redis.call('HMGET', JOB(ref), 'model', 'served', 'revision')
    return job[1] == model and job[2] == own and job[3] and job[3] ~= ''
end
for _, ref in ipairs(redis.call('ZRANGE', LEASES, 0, -1)) do
    if its(ref) then return 1 end
end
for _, user in ipairs(redis.call('ZRANGE', USERS(model), 0, -1)) do
    for _, ref in ipairs(redis.call('ZRANGE', QUEUE(model, user), 0, -1)) do
        if its(ref) then return 1 end
    end
end
return 0
