-- ARGV: ref user id model digest priority payload blob footprint timeout_s queued_per_user queued_total
--       running_per_user queue_ttl_ms created_by revision key_digest served
local ref, user, id, model, digest = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local key = JOB(ref)
if ARGV[17] ~= '' and redis.call('HEXISTS', ACCOUNTS, ARGV[17]) == 0 then return {'revoked', 0} end
local known = redis.call('HGET', key, 'digest')
if known then
    if known ~= digest then return {'conflict', 0} end
    return {redis.call('HGET', key, 'status'), -1}
end
if redis.call('SISMEMBER', RETIRED, model) == 1 then return {'retired', 0} end
local serves = redis.call('HMGET', MODEL(model), 'served', 'closed')
if ARGV[18] ~= '' and serves[1] and serves[1] ~= ARGV[18] then return {'moved', 0} end
if ARGV[16] ~= '' and serves[2] and serves[2] == ARGV[18] then return {'closed', 0} end
local queued = redis.call('SCARD', QUEUED(user))
if queued >= tonumber(ARGV[11]) then return {'full', queued} end
local total = tonumber(redis.call('GET', TOTAL) or 0)
if total >= tonumber(ARGV[12]) then return {'crowded', total} end
local time = now()
-- Lower goes first: a step of priority outweighs any number of submissions.
local order = redis.call('INCR', ORDER) - tonumber(ARGV[6]) * 1099511627776
redis.call('HSET', key, 'user', user, 'id', id, 'model', model, 'digest', digest, 'status', 'queued',
    'attempt', 0, 'seq', 0, 'order', order, 'payload', ARGV[7], 'blob', ARGV[8], 'footprint', ARGV[9],
    'timeout_s', ARGV[10], 'key', ARGV[15], 'revision', ARGV[16], 'served', ARGV[18], 'created_ms', time)
redis.call('ZADD', JOBS(user), time, id)
redis.call('ZADD', EXPIRY, time + tonumber(ARGV[14]), ref)
emit(ref, 'status', cmsgpack.pack({status = 'queued'}))
enter_queue(ref, {model = model, user = user, order = order})
for place, other in ipairs(fair(model, 64, tonumber(ARGV[13]))) do
    if other == ref then return {'queued', place} end
end
return {'queued', tonumber(redis.call('HGET', CLOCK(model), '/depth'))}
