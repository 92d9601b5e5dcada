// better-sqlite3 on Node, with the statements of the hand-written contender. It brings an SQLite of its own.
//
//   node better_sqlite3.js STATEMENTS TARGET DURABILITY [traced]     serves requests, as worker.py does
//   node better_sqlite3.js STATEMENTS describe
//
// STATEMENTS is a JSON object: the statements by name, the pragmas, and the constants that all contenders share.
"use strict";

const { createHash, randomBytes } = require("node:crypto");
const { readFileSync } = require("node:fs");
const readline = require("node:readline");
const zlib = require("node:zlib");
const Database = require("better-sqlite3");

const [given, target, durability, ...options] = process.argv.slice(2);
const { sql, pragmas, constants } = JSON.parse(given);
const { DAY, GRACE, GRANULARITY, LEASE, BATCH, METHOD, FINGERPRINT, TRACE } = constants;

if (target === "describe") {
  const memory = new Database(":memory:");
  const version = memory.prepare("SELECT sqlite_version()").pluck().get();
  console.log(`${require("better-sqlite3/package.json").version}, Node ${process.versions.node}, SQLite ${version}`);
  process.exit(0);
}

const database = new Database(target, { fileMustExist: true });
for (const pragma of [...pragmas, `synchronous=${durability}`]) database.pragma(pragma);
const statements = Object.fromEntries(Object.entries(sql).map(([name, text]) => [name, database.prepare(text)]));

let moment = 0;
const traced = options.includes("traced");
const now = () => (traced ? moment : Date.now());

const reading = (read) => database.transaction(read).deferred;
const writing = (write) => database.transaction(write).immediate;

const routeKey = (agent, sender, channel) =>
  createHash("sha256").update(JSON.stringify([agent, sender, channel])).digest("hex");

const read = reading((statement, ...parameters) => statement.get(...parameters));
const readAll = reading((statement, ...parameters) => statement.all(...parameters));
const write = writing((statement, ...parameters) => statement.run(...parameters).changes);

const contender = {
  device: (id) => read(statements.DEVICE, id),
  find_key: (device, method, key) => read(statements.FIND_KEY, device, method, key, now()),
  agent_sessions: (agent, limit) => readAll(statements.SESSIONS, agent, limit),
  seen(device) {
    const at = now();
    return write(statements.SEEN, at, device, at - GRANULARITY) > 0;
  },
  consume(device, nonce, until) {
    const at = now();
    return write(statements.CONSUME, nonce, device, at, until, at) > 0;
  },
  insert_key(device, method, key, result) {
    const at = now();
    return write(statements.INSERT_KEY, key, method, device, result, at, at + DAY, at) > 0;
  },
  claim(device, method, key, result) {
    const at = now();
    const [owner, downstream] = [randomBytes(16).toString("hex"), randomBytes(16).toString("hex")];
    const claimed = [key, method, device, at, at + DAY, FINGERPRINT, owner, at + LEASE, downstream, at];
    if (!write(statements.CLAIM, ...claimed)) return false;
    return write(statements.COMPLETE, result, now() + DAY, owner, device, method, key, owner) > 0;
  },
  index: writing((rows) => {
    for (const row of rows) statements.INDEX.run(row);
    return rows.length;
  }),
};

// Results as JSON text and sessions as the parameters of their statement, as the hand-written contender has them.
const prepared = {
  insert_key: (each) => [...each.slice(0, 3), JSON.stringify(each[3])],
  claim: (each) => [...each.slice(0, 3), JSON.stringify(each[3])],
  index: ([rows]) => [
    rows.map((row) => {
      const route = routeKey(...row.slice(1, 4));
      return [...row, route, route];
    }),
  ],
};

function welcome(device) {
  if (contender.device(device) !== undefined) return;
  write(statements.CREATE_DEVICE, device, "client", `sha256$of-${device}`, now(), null, null);
  write(statements.APPROVE, now(), device);
}

const answer = writing((event) => {
  const at = now();
  statements.SEEN.run(at, event.device, at - GRANULARITY);
  if (statements.AGENT.get(event.agent) === undefined) {
    statements.CREATE_AGENT.run(event.agent, event.agent, `/srv/agents/${event.agent}`, at, null);
  }
  if (statements.SESSION.get(event.session) === undefined) {
    const row = [event.session, event.agent, event.sender, event.channel, at, at];
    const route = routeKey(event.agent, event.sender, event.channel);
    if (!statements.CREATE_SESSION.run(...row, route).changes) statements.CREATE_SESSION.run(...row, null);
  }
  statements.TOUCH.run(at, event.session, at);
  if (statements.FIND_KEY.get(event.device, METHOD, event.key, at) !== undefined) return true;
  const result = JSON.stringify({ session: event.session, accepted_at: at });
  statements.INSERT_KEY.run(event.key, METHOD, event.device, result, at, at + DAY, at);
  return false;
});

function sweep() {
  let total = 0;
  for (const [statement, before] of [
    [statements.SWEEP_NONCES, now() - GRACE],
    [statements.SWEEP_KEYS, now()],
  ]) {
    for (let count = BATCH; count === BATCH; total += count) count = write(statement, before, BATCH);
  }
  return total;
}

function live(events, seconds) {
  const deadline = performance.now() + seconds * 1000;
  const tally = { refused: 0, retries: 0, swept: 0 };
  const known = new Set();
  let nextSweep = 0;
  let lived = 0;
  for (const event of events) {
    if (lived > 0 && performance.now() > deadline) break;
    lived += 1;
    moment = event.at;
    if (moment >= nextSweep) {
      tally.swept += nextSweep ? sweep() : 0;
      nextSweep = moment + DAY;
    }
    if (!known.has(event.device)) {
      welcome(event.device);
      known.add(event.device);
    }
    if (!contender.consume(event.device, event.nonce, moment + DAY)) tally.refused += 1;
    else if (answer(event)) tally.retries += 1;
  }
  return { tally, lived };
}

function timed(work) {
  const cpu = process.cpuUsage();
  const start = process.hrtime.bigint();
  const result = work();
  const seconds = Number(process.hrtime.bigint() - start) / 1e9;
  const used = process.cpuUsage(cpu);
  return { seconds, cpu: (used.user + used.system) / 1e6, result };
}

function plain(work, found) {
  const row = (each) => ({
    ...each,
    ...("metadata" in each ? { metadata: each.metadata === null ? null : JSON.parse(each.metadata) } : {}),
    ...("result" in each ? { result: JSON.parse(each.result) } : {}),
  });
  if (found === undefined) return null;
  if (Array.isArray(found)) return found.map(row);
  return typeof found === "object" ? row(found) : found;
}

const acts = {
  time({ work, arguments: calls }) {
    const ready = calls.map(prepared[work] ?? ((each) => each));
    const operation = contender[work];
    const { seconds, cpu } = timed(() => {
      for (const each of ready) {
        if (!operation(...each)) throw new Error("it found or wrote nothing");
      }
    });
    return { seconds, cpu };
  },
  ask({ work, arguments: calls }) {
    const ready = calls.map(prepared[work] ?? ((each) => each));
    return { answers: ready.map((each) => plain(work, contender[work](...each))) };
  },
  replay({ events, seconds: limit }) {
    const lines = zlib.gunzipSync(readFileSync(TRACE)).toString("utf-8").trimEnd().split("\n");
    const trace = lines.slice(0, events ?? undefined).map((line) => JSON.parse(line));
    const { seconds, cpu, result } = timed(() => live(trace, limit));
    return { seconds, cpu, events: result.lived, tally: result.tally };
  },
  end() {
    database.close();
    return {};
  },
};

readline.createInterface({ input: process.stdin }).on("line", (line) => {
  const request = JSON.parse(line);
  let reply;
  try {
    reply = acts[request.do](request);
  } catch (error) {
    reply = { error: error.name, message: error.message };
  }
  process.stdout.write(`${JSON.stringify(reply)}\n`);
  if (request.do === "end") process.exit(0);
});
