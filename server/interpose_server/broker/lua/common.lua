-- Shared by every script: time, events, the one way a job changes state, the fair order.

local function now()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function map(flat)
    local found = {}
    for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
    return found
end

-- What this script appended, by ref: {seq, kind, attempt, body, data, blob} each.
local fresh = {}

-- Append an event. kind: status, save, log. body: msgpack. blob: where its bytes are, or ''. data: the bytes.
local function emit(ref, kind, body, data, blob)
    local seq = redis.call('HINCRBY', JOB(ref), 'seq', 1)
    local attempt = redis.call('HGET', JOB(ref), 'attempt')
    redis.call('XADD', EVENTS(ref), seq .. '-0', 'k', kind, 'a', attempt, 'm', body, 'd', data or '', 'b', blob or '')
    fresh[ref] = fresh[ref] or {}
    table.insert(fresh[ref], {seq, kind, attempt, body, data or '', blob or ''})
end

-- Tell whoever follows a job that there is more of it. Small events go along, so that nobody has to read them:
-- '+' and msgpack of {ref, events}, or '~' where it can wait a moment. Else the ref alone.
local function wake(ref, lazily)
    local events, size = fresh[ref] or {}, 0
    fresh[ref] = nil
    for _, event in ipairs(events) do size = size + #event[4] + #event[5] end
    if #events == 0 or size > PUSHED then
        redis.call('PUBLISH', WAKE, ref)
    else
        redis.call('PUBLISH', WAKE, (lazily and '~' or '+') .. cmsgpack.pack({ref, events}))
    end
end

local function ring(model)
    redis.call('LPUSH', BELL(model), '1')
    redis.call('LTRIM', BELL(model), 0, 15)
end

local function enter_queue(ref, job)
    local users, user = USERS(job.model), job.user
    redis.call('ZADD', QUEUE(job.model, user), job.order, ref)
    redis.call('SADD', QUEUED(user), ref)
    redis.call('HINCRBY', CLOCK(job.model), '/depth', 1)
    redis.call('HSET', CLOCK(job.model), '/used', now())
    redis.call('INCR', TOTAL)
    if not redis.call('ZSCORE', users, user) then
        -- Someone who was away doesn't come back with a credit for the time.
        local times = redis.call('HMGET', CLOCK(job.model), user, '/now')
        redis.call('ZADD', users, math.max(tonumber(times[1] or 0), tonumber(times[2] or 0)), user)
    end
    ring(job.model)
end

local function leave_queue(ref, job)
    local queue = QUEUE(job.model, job.user)
    redis.call('ZREM', queue, ref)
    redis.call('SREM', QUEUED(job.user), ref)
    redis.call('HINCRBY', CLOCK(job.model), '/depth', -1)
    redis.call('DECR', TOTAL)
    if redis.call('EXISTS', queue) == 0 then redis.call('ZREM', USERS(job.model), job.user) end
end

local function leave_worker(ref, job)
    redis.call('SREM', RUNNING(job.user), ref)
    redis.call('ZREM', LEASES, ref)
    redis.call('HINCRBY', CLOCK(job.model), '/running', -1)
    redis.call('HSET', CLOCK(job.model), '/used', now())
    -- The user may have been at the most jobs running at once.
    if redis.call('EXISTS', QUEUE(job.model, job.user)) == 1 then ring(job.model) end
end

-- The only place where a job's status is written after its submission. Returns whether the way is open.
local function become(ref, status, problem, ttl)
    local key = JOB(ref)
    local job = map(redis.call('HGETALL', key))
    if not job.status or not WAYS[job.status][status] then return false end
    if job.status == 'queued' then leave_queue(ref, job) end
    if job.status == 'running' then leave_worker(ref, job) end
    redis.call('HSET', key, 'status', status)
    local time = now()
    redis.call('HINCRBY', TALLY(job.model), status == 'queued' and 'requeued' or status, 1)
    if status == 'queued' then
        redis.call('HDEL', key, 'worker')
        redis.call('HSET', key, 'alone', '1')
        enter_queue(ref, job)
    elseif status == 'running' then
        redis.call('SADD', RUNNING(job.user), ref)
        redis.call('HINCRBY', CLOCK(job.model), '/running', 1)
        redis.call('HINCRBY', TALLY(job.model), 'wait_ms', time - job.created_ms)
        redis.call('HINCRBY', key, 'attempt', 1)
        redis.call('HSET', key, 'started_ms', time, 'applied', 0)
    else
        redis.call('HSET', key, 'ended_ms', time)
        redis.call('HDEL', key, 'payload', 'worker')
        if problem and problem ~= '' then redis.call('HSET', key, 'error', problem) end
        redis.call('ZADD', EXPIRY, time + ttl, ref)
    end
    local body = cmsgpack.pack({status = status})
    if problem and problem ~= '' then
        -- {"status": status, "error": problem}, by hand: Lua can't tell an empty list from an empty map.
        body = '\130\166status' .. cmsgpack.pack(status) .. '\165error' .. problem
    end
    emit(ref, 'status', body)
    wake(ref, status == 'running')
    return true
end

-- End the jobs that wait for a model, unless a copy that was heard of within `silence` ms may yet run them. Returns
-- their refs.
local function give_up(model, problem, ttl, silence)
    if silence > 0 then
        local states = map(redis.call('HGETALL', STATES(model)))
        for _, worker in ipairs(redis.call('ZRANGEBYSCORE', HEARD(model), now() - silence, '+inf')) do
            if states[worker] == 'ready' or states[worker] == 'loading' then return {} end
        end
    end
    local ended = {}
    for _, user in ipairs(redis.call('ZRANGE', USERS(model), 0, -1)) do
        for _, ref in ipairs(redis.call('ZRANGE', QUEUE(model, user), 0, -1)) do
            become(ref, 'failed', problem, ttl)
            table.insert(ended, ref)
        end
    end
    return ended
end

-- Make a waiting job this worker's, for one lease. Returns its hash; nothing if it waits no longer.
local function claim(ref, model, worker, lease)
    local job = redis.call('HMGET', JOB(ref), 'status', 'model', 'user')
    if job[1] ~= 'queued' or job[2] ~= model then return nil end
    local tag = tonumber(redis.call('ZSCORE', USERS(model), job[3]) or 0)
    local clock = tonumber(redis.call('HGET', CLOCK(model), '/now') or 0)
    if tag > clock then redis.call('HSET', CLOCK(model), '/now', tag) end
    become(ref, 'running')
    redis.call('HSET', JOB(ref), 'worker', worker)
    redis.call('ZADD', LEASES, now() + lease, ref)
    return redis.call('HGETALL', JOB(ref))
end

-- Whether a copy that was heard of within `silence` ms runs jobs, or is about to.
local function able(model, worker, silence)
    local state = redis.call('HGET', STATES(model), worker)
    local heard = tonumber(redis.call('ZSCORE', HEARD(model), worker) or 0)
    return (state == 'ready' or state == 'loading') and heard >= now() - silence
end

-- Which jobs a copy leaves to others, by what the model served when they were checked: nil for none, else a function.
-- To copies that serve that; and one that serves what the model no longer does has nothing to do with what came since.
local function left_to_others(model, copy, silence)
    local served = map(redis.call('HGETALL', SERVED(model)))
    local own, current = served[copy], redis.call('HGET', MODEL(model), 'served')
    if not own then return nil end
    if current and current ~= own then
        return function(revision) return revision ~= '' and revision ~= own end
    end
    local found = nil
    for worker, revision in pairs(served) do
        if revision ~= own and able(model, worker, silence) then
            found = found or {}
            found[revision] = true
        end
    end
    return found and function(revision) return found[revision] end
end

-- The next refs of a model, fairest first: users by virtual time, each further job of one user counted as what
-- the user's jobs took of late. `left`: tells which revisions' jobs are left to others, if any are.
local function fair(model, most, running_per_user, left)
    local lanes = {}
    local users = redis.call('ZRANGE', USERS(model), 0, most - 1, 'WITHSCORES')
    for i = 1, #users, 2 do
        local user = users[i]
        local room = running_per_user - redis.call('SCARD', RUNNING(user))
        if room > 0 then
            local step = tonumber(redis.call('HGET', CLOCK(model), user .. '/job') or 0.05)
            table.insert(lanes, {user = user, tag = tonumber(users[i + 1]), step = step, room = room, at = 0})
        end
    end
    local found, passed = {}, 0
    while #found < most and passed < 4096 do
        local best
        for _, lane in ipairs(lanes) do
            if lane.room > 0 and (not best or lane.tag < best.tag) then best = lane end
        end
        if not best then break end
        local ref = redis.call('ZRANGE', QUEUE(model, best.user), best.at, best.at)[1]
        if ref and left and left(redis.call('HGET', JOB(ref), 'served') or '') then
            best.at, passed = best.at + 1, passed + 1
        elseif ref then
            table.insert(found, ref)
            best.at, best.tag, best.room = best.at + 1, best.tag + best.step, best.room - 1
        else
            best.room = 0
        end
    end
    return found
end
