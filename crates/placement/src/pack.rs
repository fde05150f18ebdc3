//! Packing the copies of one layer's experts into the slots of its shards.
//!
//! Heaviest copy first, each to the least-loaded shard that has room and does not hold the expert yet. Two
//! additions to the published packing: copies of an expert never share a shard (a shard's loss then takes
//! at most one), and among shards equally loaded the choice is the one that shares the fewest experts with
//! those already holding a copy, so that the load of a lost shard falls on many and not on a twin.
//!
//! That a copy must avoid shards can leave only forbidden ones with room. Then one swap makes a place, and
//! one always exists: let `a` have room and hold the expert `e`, and `b` lack `e`; `b` is full, or it would
//! have been chosen. Rooms differ by at most one, so `b` holds at least as many experts as `a`; `a` holds
//! `e` and `b` does not, so `b` holds some `f` that `a` does not. Move `f` to `a` and put `e` into `b`.
//!
//! **Failure domains** come before load. Where shards share domains and more than one copy is guaranteed,
//! the guaranteed copies of all experts are placed first, each expert's in different domains, and a choice
//! is taken only if the rest can still be placed so: with `n` experts to come, `k` copies each, and `c(d)`
//! slots free in domain `d`, that is so exactly if the sum over `d` of `min(c(d), n)` is at least `n * k`
//! (Gale and Ryser, for rows of equal sums). If it cannot be so from the start, as many as the greedy
//! order finds are spread. A domain that is left always has a shard with room, and no shard of it holds
//! the expert, so these copies need no swap. Swaps for the other copies move an expert that keeps its
//! domains if there is one; what they break, exchanges of two copies repair at the end.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use crate::plan::DomainIndex;

/// Binary digits behind the point of a copy's load: tokens / copies as an integer. 64 bits of tokens, 32 of
/// fraction and 2^16 slots stay within 128 bits, and equal ratios give equal numbers.
const FRACTION_BITS: u32 = 32;

/// The failure domain of every shard, numbered from 0; shards of unknown domains have one each.
#[derive(Debug)]
pub(crate) struct Domains {
    of: Vec<usize>,
    count: usize,
}

impl Domains {
    /// As given per shard; an empty list says nothing about any.
    pub(crate) fn new(given: &[Option<DomainIndex>], shards: usize) -> Self {
        let mut numbers = BTreeMap::new();
        let mut count = 0;
        let mut of = Vec::with_capacity(shards);
        for shard in 0..shards {
            let known = given.get(shard).copied().flatten();
            let mut fresh = || {
                count += 1;
                count - 1
            };
            of.push(match known {
                Some(domain) => *numbers.entry(domain).or_insert_with(fresh),
                None => fresh(),
            });
        }
        Self { of, count }
    }

    /// Whether two shards share a domain; if none do, keeping copies on different shards is enough.
    fn shared(&self) -> bool {
        self.count < self.of.len()
    }
}

/// Chooses the experts of each shard, ascending. Needs: `copies[e]` in `1..=room.len()`, their sum equal
/// to the sum of `room`, and rooms within one of each other.
pub(crate) fn pack(
    tokens: &[u64],
    copies: &[usize],
    room: &[usize],
    min_copies: usize,
    domains: &Domains,
) -> Vec<Vec<usize>> {
    let share = shares(tokens, copies);
    let mut shards = Shards::new(&share, room, domains, min_copies);
    let placed = shards.spread(copies);
    shards.fill(copies, placed);
    if placed > 0 {
        shards.repair(copies.len(), placed);
    }
    shards.held
}

/// Moves copies between shards until every expert is in as many domains as its guaranteed copies can be in: by
/// exchanges of two copies, which keep all others where they are. Where those cannot do it and packing anew can,
/// the layer is packed anew. `held` as [`pack`] returns it.
pub(crate) fn respread(
    tokens: &[u64],
    held: &[Vec<usize>],
    min_copies: usize,
    domains: &Domains,
) -> Vec<Vec<usize>> {
    let mut copies = vec![0; tokens.len()];
    for &expert in held.iter().flatten() {
        copies[expert] += 1;
    }
    let room: Vec<usize> = held.iter().map(Vec::len).collect();
    let share = shares(tokens, &copies);
    let mut shards = Shards::new(&share, &room, domains, min_copies);
    for (shard, experts) in held.iter().enumerate() {
        for &expert in experts {
            shards.put(shard, expert);
        }
    }
    shards.repair(copies.len(), min_copies.min(domains.count));
    let left = crowded(&shards.held, copies.len(), min_copies, domains);
    if left > 0 {
        let anew = pack(tokens, &copies, &room, min_copies, domains);
        if crowded(&anew, copies.len(), min_copies, domains) < left {
            return anew;
        }
    }
    shards.held
}

/// Experts that are in fewer domains than their guaranteed copies could be in.
pub(crate) fn crowded(held: &[Vec<usize>], experts: usize, min_copies: usize, domains: &Domains) -> usize {
    let mut of = vec![BTreeSet::new(); experts];
    for (shard, held) in held.iter().enumerate() {
        for &expert in held {
            of[expert].insert(domains.of[shard]);
        }
    }
    of.iter().filter(|domains_of| domains_of.len() < min_copies.min(domains.count)).count()
}

/// Load of one copy of each expert.
fn shares(tokens: &[u64], copies: &[usize]) -> Vec<u128> {
    let share = |(&tokens, &copies): (&u64, &usize)| (u128::from(tokens) << FRACTION_BITS) / copies as u128;
    tokens.iter().zip(copies).map(share).collect()
}

/// The shards while they fill.
struct Shards<'a> {
    /// Load of one copy, per expert.
    share: &'a [u128],
    /// Slots of each shard.
    room: &'a [usize],
    /// Experts on each shard, ascending.
    held: Vec<Vec<usize>>,
    load: Vec<u128>,
    /// Experts that two shards both hold.
    common: Vec<Vec<usize>>,
    domains: &'a Domains,
    /// Guaranteed copies of each expert.
    min_copies: usize,
}

impl<'a> Shards<'a> {
    fn new(share: &'a [u128], room: &'a [usize], domains: &'a Domains, min_copies: usize) -> Self {
        let count = room.len();
        Self {
            share,
            room,
            held: vec![Vec::new(); count],
            load: vec![0; count],
            common: vec![vec![0; count]; count],
            domains,
            min_copies,
        }
    }

    fn heaviest_first(&self, copies: &[usize]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..copies.len()).collect();
        order.sort_by_key(|&expert| Reverse(self.share[expert]));
        order
    }

    /// Places the guaranteed copies in different domains, if domains need any care; returns how many
    /// copies of each expert are placed.
    fn spread(&mut self, copies: &[usize]) -> usize {
        let k = self.min_copies.min(self.domains.count);
        if k < 2 || !self.domains.shared() {
            return 0;
        }
        let mut free = vec![0; self.domains.count];
        for (shard, room) in self.room.iter().enumerate() {
            free[self.domains.of[shard]] += room;
        }
        let possible = completes(&free, copies.len(), k);
        for (done, expert) in self.heaviest_first(copies).into_iter().enumerate() {
            let left = copies.len() - done - 1;
            let mut used = BTreeSet::new();
            for nth in 0..k {
                // Without an order that spreads all, the roomiest domains serve the most experts.
                let keeps = |domain: usize| {
                    !possible || {
                        let mut after = free.clone();
                        after[domain] -= 1;
                        completes_with(&mut after, &used, domain, k - nth - 1, left, k)
                    }
                };
                let Some(shard) = self.choose_spread(expert, &used, &free, possible, keeps) else { break };
                let domain = self.domains.of[shard];
                used.insert(domain);
                free[domain] -= 1;
                self.put(shard, expert);
            }
        }
        k
    }

    /// The least loaded shard, as in [`Self::choose`], of a domain that is not used and may be.
    fn choose_spread(
        &self,
        expert: usize,
        used: &BTreeSet<usize>,
        free: &[usize],
        possible: bool,
        keeps: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let holders = self.holders(expert);
        let mut open: Vec<usize> = (0..self.held.len())
            .filter(|&shard| self.has_room(shard) && !used.contains(&self.domains.of[shard]))
            .collect();
        open.sort_by_key(|&shard| {
            let common: usize = holders.iter().map(|&other| self.common[other][shard]).sum();
            let roomiest = if possible { 0 } else { usize::MAX - free[self.domains.of[shard]] };
            (roomiest, self.load[shard], common, shard)
        });
        let mut judged = BTreeMap::new();
        open.into_iter().find(|&shard| {
            let domain = self.domains.of[shard];
            *judged.entry(domain).or_insert_with(|| keeps(domain))
        })
    }

    /// Places what is not placed yet.
    fn fill(&mut self, copies: &[usize], placed: usize) {
        for expert in self.heaviest_first(copies) {
            let already = if placed == 0 { 0 } else { self.holders(expert).len() };
            for _ in already..copies[expert] {
                match self.choose(expert) {
                    Some(shard) => self.put(shard, expert),
                    None => self.swap_in(expert),
                }
            }
        }
    }

    fn holds(&self, shard: usize, expert: usize) -> bool {
        self.held[shard].binary_search(&expert).is_ok()
    }

    fn has_room(&self, shard: usize) -> bool {
        self.held[shard].len() < self.room[shard]
    }

    fn holders(&self, expert: usize) -> Vec<usize> {
        (0..self.held.len()).filter(|&shard| self.holds(shard, expert)).collect()
    }

    /// Where the next copy goes: least loaded, then least in common with the holders, then first.
    fn choose(&self, expert: usize) -> Option<usize> {
        let holders = self.holders(expert);
        (0..self.held.len()).filter(|&shard| self.has_room(shard) && !holders.contains(&shard)).min_by_key(
            |&shard| {
                let common: usize = holders.iter().map(|&other| self.common[other][shard]).sum();
                (self.load[shard], common, shard)
            },
        )
    }

    /// Makes a place by moving some `f` from a full shard `b` to a shard `a` with room: the move after
    /// which the heavier of the two is lightest, first on ties.
    fn swap_in(&mut self, expert: usize) {
        let open: Vec<usize> = (0..self.held.len()).filter(|&shard| self.has_room(shard)).collect();
        let (_, _, a, b, moved) = (0..self.held.len())
            .filter(|&b| !self.holds(b, expert))
            .flat_map(|b| open.iter().map(move |&a| (a, b)))
            .flat_map(|(a, b)| self.held[b].iter().map(move |&moved| (a, b, moved)))
            .filter(|&(a, _, moved)| !self.holds(a, moved))
            .map(|(a, b, moved)| {
                let at_a = self.load[a] + self.share[moved];
                let at_b = self.load[b] - self.share[moved] + self.share[expert];
                (self.loses_a_domain(moved, b, a), at_a.max(at_b), a, b, moved)
            })
            .min()
            .expect("a full shard without the expert holds one that the open shard lacks (see above)");
        self.take(b, moved);
        self.put(a, moved);
        self.put(b, expert);
    }

    /// Exchanges copies until every expert is in `k` domains, or no exchange brings one nearer.
    fn repair(&mut self, experts: usize, k: usize) {
        for expert in 0..experts {
            while self.domains_of(expert).len() < k {
                let Some((c, s, other)) = self.exchange(expert, k) else { break };
                self.take(c, expert);
                self.take(s, other);
                self.put(s, expert);
                self.put(c, other);
            }
        }
    }

    /// A copy of `expert` that its domain can spare (on `c`), and a copy of another expert in a domain
    /// without it (on `s`), such that the other may go to `c`; the one after which the heavier of the two
    /// shards is lightest.
    fn exchange(&self, expert: usize, k: usize) -> Option<(usize, usize, usize)> {
        let of = |shard: usize| self.domains.of[shard];
        let (holders, covered) = (self.holders(expert), self.domains_of(expert));
        let spared = |c: usize| holders.iter().any(|&other| other != c && of(other) == of(c));
        let after =
            |shard: usize, out: usize, into: usize| self.load[shard] - self.share[out] + self.share[into];
        holders
            .iter()
            .copied()
            .filter(|&c| spared(c))
            .flat_map(|c| (0..self.held.len()).map(move |s| (c, s)))
            .filter(|&(_, s)| !covered.contains(&of(s)))
            .flat_map(|(c, s)| self.held[s].iter().map(move |&other| (c, s, other)))
            .filter(|&(c, s, other)| {
                !self.holds(c, other)
                    && (self.domains_after(other, s, c) >= k.min(self.domains_of(other).len()))
            })
            .min_by_key(|&(c, s, other)| (after(c, expert, other).max(after(s, other, expert)), c, s, other))
    }

    fn domains_of(&self, expert: usize) -> BTreeSet<usize> {
        self.holders(expert).into_iter().map(|shard| self.domains.of[shard]).collect()
    }

    fn domains_after(&self, expert: usize, from: usize, to: usize) -> usize {
        let stays = self.holders(expert).into_iter().filter(|&shard| shard != from).chain([to]);
        stays.map(|shard| self.domains.of[shard]).collect::<BTreeSet<_>>().len()
    }

    /// Whether moving an expert between shards leaves it in fewer domains than are guaranteed.
    fn loses_a_domain(&self, expert: usize, from: usize, to: usize) -> bool {
        let after = self.domains_after(expert, from, to);
        after < self.domains_of(expert).len().min(self.min_copies)
    }

    fn put(&mut self, shard: usize, expert: usize) {
        for other in self.holders(expert) {
            self.common[other][shard] += 1;
            self.common[shard][other] += 1;
        }
        let at = self.held[shard].partition_point(|&held| held < expert);
        self.held[shard].insert(at, expert);
        self.load[shard] += self.share[expert];
    }

    fn take(&mut self, shard: usize, expert: usize) {
        self.held[shard].retain(|&held| held != expert);
        self.load[shard] -= self.share[expert];
        for other in self.holders(expert) {
            self.common[other][shard] -= 1;
            self.common[shard][other] -= 1;
        }
    }
}

/// Whether `n` experts can each have `k` copies in different domains with so many free slots.
fn completes(free: &[usize], n: usize, k: usize) -> bool {
    free.iter().map(|&free| free.min(n)).sum::<usize>() >= n * k
}

/// Whether an expert that has `used` and `chosen` can get `more` domains, and `n` experts after it `k`
/// each. `free` is what is left now; the domains taken are those with the most room, which keeps the rest
/// as even as can be.
fn completes_with(
    free: &mut [usize],
    used: &BTreeSet<usize>,
    chosen: usize,
    more: usize,
    n: usize,
    k: usize,
) -> bool {
    let mut others: Vec<usize> = (0..free.len())
        .filter(|domain| *domain != chosen && !used.contains(domain) && free[*domain] > 0)
        .collect();
    if others.len() < more {
        return false;
    }
    others.sort_by_key(|&domain| Reverse(free[domain]));
    for &domain in &others[..more] {
        free[domain] -= 1;
    }
    completes(free, n, k)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn apart(shards: usize) -> Domains {
        Domains::new(&[], shards)
    }

    #[test]
    fn unknown_domains_are_domains_of_their_own() {
        let domains = Domains::new(&[Some(DomainIndex(7)), None, Some(DomainIndex(7)), None], 4);
        assert_eq!((domains.of.as_slice(), domains.count), ([0, 1, 0, 2].as_slice(), 3));
        assert!(domains.shared());
        assert!(!apart(3).shared());
    }

    #[test]
    fn heaviest_first_to_the_least_loaded() {
        assert_eq!(pack(&[9, 1, 5, 4], &[1; 4], &[2, 2], 1, &apart(2)), [vec![0, 1], vec![2, 3]]);
    }

    #[test]
    fn equal_loads_spread_over_many_partners() {
        let held = pack(&[1; 12], &[2; 12], &[6; 4], 2, &apart(4));
        for a in 0..4 {
            for b in 0..a {
                let common = held[a].iter().filter(|expert| held[b].contains(expert)).count();
                assert!((1..=3).contains(&common), "shards {b} and {a} share {common} of 12: {held:?}");
            }
        }
    }

    #[test]
    fn a_swap_makes_a_place_where_only_forbidden_shards_have_room() {
        // Expert 0 fills half of shard 0's load; 1 and 2 fill shard 1, and then both copies of expert 3 find
        // room on shard 0 only. Either of 1 and 2 may move over; the first does.
        let held = pack(&[100, 5, 5, 2], &[1, 1, 1, 2], &[3, 2], 1, &apart(2));
        assert_eq!(held, [vec![0, 1, 3], vec![2, 3]]);
    }

    proptest! {
        /// Full and nearly full shards, where swaps happen: the counts kept along the way stay true.
        #[test]
        fn loads_and_common_experts_are_counted_right(
            tokens in prop::collection::vec(0u64..50, 1..10),
            shards in 1usize..6,
            spared in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut copies = vec![shards; tokens.len()];
            for index in spared {
                let spare = &mut copies[index.index(tokens.len())];
                *spare = (*spare - 1).max(1);
            }
            let slots: usize = copies.iter().sum();
            let room: Vec<usize> =
                (0..shards).map(|shard| slots / shards + usize::from(shard < slots % shards)).collect();
            let share = shares(&tokens, &copies);
            let domains = apart(shards);
            let mut filled = Shards::new(&share, &room, &domains, 1);
            filled.fill(&copies, 0);
            for (a, &room) in room.iter().enumerate() {
                prop_assert_eq!(filled.held[a].len(), room);
                prop_assert_eq!(filled.load[a], filled.held[a].iter().map(|&expert| share[expert]).sum());
                for b in (0..shards).filter(|&b| b != a) {
                    let common = filled.held[a].iter().filter(|&&expert| filled.holds(b, expert)).count();
                    prop_assert_eq!(filled.common[a][b], common);
                }
            }
            for (expert, &copies) in copies.iter().enumerate() {
                prop_assert_eq!(filled.holders(expert).len(), copies);
            }
        }
    }
}
