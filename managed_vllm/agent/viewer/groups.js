"use strict";
// A run by task, where the page itself has the rows: what `table.py` says of a run that is served.
globalThis.runGroups = (successAt) => {
  const MOST_BARS = 64;
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = (values) => (values.length ? sum(values) / values.length : null);
  const value = (row) => Number(row.reward); // Python's nan and infinities come as text

  // A row for each task, as they appeared: its group of rollouts, and how far they spread.
  function groups(rows) {
    const byTask = new Map();
    for (const row of rows) {
      if (!byTask.has(row.task)) byTask.set(row.task, []);
      byTask.get(row.task).push(row);
    }
    return [...byTask].map(([task, some]) => group(task, some));
  }

  function group(task, some) {
    const counting = some.filter((row) => row.ok && row.stands).sort((a, b) => a.rollout - b.rollout);
    const rewarded = counting.filter((row) => row.reward !== null);
    const n = rewarded.length, c = rewarded.filter((row) => value(row) >= successAt).length;
    const finite = rewarded.map(value).filter(Number.isFinite);
    const reward = mean(finite);
    return {
      task, rollouts: new Set(some.map((row) => row.rollout)).size, counting: counting.length, rewarded: n, successes: c,
      success: n ? c / n : null, passn: n ? Number(c > 0) : null, reward,
      spread: reward === null ? null : Math.sqrt(mean(finite.map((each) => (each - reward) ** 2))),
      rewards: rewarded.slice(0, MOST_BARS).map((row) => row.reward),
      attempts: rewarded.slice(0, MOST_BARS).map((row) => [row.rollout, row.round, row.attempt]),
      steps: mean(counting.map((row) => row.steps)), tokens: sum(some.map((row) => row.tokens)),
      failures: some.filter((row) => row.failure !== null).length,
    };
  }

  // Each with the same task in the other run, and by how much its mean reward changed.
  function compared(mine, others) {
    const byTask = new Map(others.map((row) => [row.task, row]));
    return mine.map((row) => {
      const other = byTask.get(row.task) || null;
      const known = other !== null && other.reward !== null && row.reward !== null;
      return { ...row, other, change: known ? row.reward - other.reward : null };
    });
  }

  // pass@k for k = 1, 2, 4, … up to the size of most groups; each over the groups that are large enough.
  function passes(rows) {
    const sizes = new Map();
    for (const { rewarded } of rows) if (rewarded) sizes.set(rewarded, (sizes.get(rewarded) || 0) + 1);
    let most = 0;
    for (const [n, many] of sizes) if (many > (sizes.get(most) || 0) || (many === sizes.get(most) && n > most)) most = n;
    const ks = [];
    for (let k = 1; k <= most; k *= 2) ks.push(k);
    if (most && ks[ks.length - 1] !== most) ks.push(most);
    return ks.map((k) => {
      const enough = rows.filter((row) => row.rewarded >= k);
      return [k, mean(enough.map((row) => 1 - misses(row.rewarded, row.successes, k)))];
    });
  }

  function misses(n, c, k) { // C(n - c, k) / C(n, k): that none of k of them is a success
    let share = 1;
    for (let i = 0; i < k; i++) share *= Math.max(0, n - c - i) / (n - i);
    return share;
  }

  return { groups, compared, passes };
};
