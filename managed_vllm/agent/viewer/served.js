"use strict";
// Where the page gets its rows from when a server has them: pages of the list, asked for as they come into sight, and
// asked for anew while the run goes on. `viewer.js` shows what is here. `changed(what)`: rows, tally, live.
globalThis.servedRun = (run, changed) => {
  const PAGE = 100, MOST_PAGES = 40, LOOK_MS = 1500;
  const token = new URLSearchParams(location.search).get("token") || "";

  async function ask(path, words = {}) {
    const given = Object.entries(words).filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false);
    const answer = await fetch(`${path}?${new URLSearchParams(given)}`, { headers: { Authorization: `Bearer ${token}` }, cache: "no-store" });
    if (answer.status === 204) return null;
    const value = await answer.json();
    if (!answer.ok) throw new Error(value.error);
    return value;
  }

  // One list: of attempts ("api/rows") or of tasks ("api/tasks").
  function pages(path, take) {
    const held = new Map(); // number of the page -> { version, rows }
    const asked = new Set();
    let query = {}, round = 0;
    const list = { length: 0, version: -1, head: null, get, select, look };

    function get(at) { // undefined: it is on its way
      const number = Math.floor(at / PAGE);
      const page = held.get(number);
      if (!page || page.version !== list.version) want(number);
      return page && page.rows[at - number * PAGE];
    }

    async function want(number, { since = null } = {}) {
      if (asked.has(number)) return;
      asked.add(number);
      const mine = round;
      try {
        const found = await ask(path, { ...query, offset: number * PAGE, limit: PAGE, since });
        if (mine !== round) return;
        changed("live", true);
        if (found === null) return;
        list.length = found.length;
        list.version = found.version;
        list.head = found;
        held.delete(number);
        held.set(number, { version: found.version, rows: found.rows.map((row, n) => take(row, number * PAGE + n)) });
        if (held.size > MOST_PAGES) held.delete(held.keys().next().value);
        changed("rows", list);
      } catch (error) {
        if (mine === round) changed("live", false, String(error.message || error));
      } finally {
        if (mine === round) asked.delete(number);
      }
    }

    async function select(wanted) { // another filter or order
      query = wanted;
      round += 1;
      asked.clear();
      held.clear();
      list.version = -1;
      await want(0);
    }

    function look(at) { // whether something has come, by the page in sight
      return want(Math.max(0, Math.floor(at / PAGE)), { since: list.version < 0 ? null : list.version });
    }

    return list;
  }

  const known = new Map(); // rows by their key, those of links, too
  function taken(row, at) {
    row.at = at;
    changed("row", row);
    known.set(row.key, row);
    if (known.size > 20_000) known.delete(known.keys().next().value);
    return row;
  }

  const attempts = pages("api/rows", taken);
  const tasks = pages("api/tasks", (row, at) => ({ ...row, at }));
  let tallied = -1;

  async function tally() {
    const version = Math.max(attempts.version, tasks.version);
    if (tallied === version) return;
    tallied = version;
    Object.assign(run, await ask("api/run"));
    changed("tally");
  }

  function every(look) { // one look after the other, none while the page is hidden
    setTimeout(async () => {
      try {
        if (!document.hidden) {
          await look();
          await tally();
        }
      } catch (error) {
        changed("live", false, String(error.message || error));
      }
      every(look);
    }, LOOK_MS);
  }

  return {
    attempts, tasks, known, every, tally,
    record: (row) => ask("api/trajectory", { number: row.number }),
    row: async (query, of, rollout, round, attempt) => {
      const { row } = await ask("api/row", { ...query, of, rollout, round, attempt });
      if (row) taken(row, row.at);
    },
    image: (name) => `image/${name}?token=${encodeURIComponent(token)}`,
  };
};
