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

use std::cmp::Reverse;

/// Binary digits behind the point of a copy's load: tokens / copies as an integer. 64 bits of tokens, 32 of
/// fraction and 2^16 slots stay within 128 bits, and equal ratios give equal numbers.
const FRACTION_BITS: u32 = 32;

/// Chooses the experts of each shard, ascending. Needs: `copies[e]` in `1..=room.len()`, their sum equal
/// to the sum of `room`, and rooms within one of each other.
pub(crate) fn pack(tokens: &[u64], copies: &[usize], room: &[usize]) -> Vec<Vec<usize>> {
    let share = shares(tokens, copies);
    let mut shards = Shards::new(&share, room);
    shards.fill(copies);
    shards.held
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
}

impl<'a> Shards<'a> {
    fn new(share: &'a [u128], room: &'a [usize]) -> Self {
        let count = room.len();
        Self {
            share,
            room,
            held: vec![Vec::new(); count],
            load: vec![0; count],
            common: vec![vec![0; count]; count],
        }
    }

    fn fill(&mut self, copies: &[usize]) {
        let mut heaviest_first: Vec<usize> = (0..copies.len()).collect();
        heaviest_first.sort_by_key(|&expert| Reverse(self.share[expert]));
        for expert in heaviest_first {
            for _ in 0..copies[expert] {
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
        let (_, a, b, moved) = (0..self.held.len())
            .filter(|&b| !self.holds(b, expert))
            .flat_map(|b| open.iter().map(move |&a| (a, b)))
            .flat_map(|(a, b)| self.held[b].iter().map(move |&moved| (a, b, moved)))
            .filter(|&(a, _, moved)| !self.holds(a, moved))
            .map(|(a, b, moved)| {
                let at_a = self.load[a] + self.share[moved];
                let at_b = self.load[b] - self.share[moved] + self.share[expert];
                (at_a.max(at_b), a, b, moved)
            })
            .min()
            .expect("a full shard without the expert holds one that the open shard lacks (see above)");
        self.take(b, moved);
        self.put(a, moved);
        self.put(b, expert);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn heaviest_first_to_the_least_loaded() {
        assert_eq!(pack(&[9, 1, 5, 4], &[1; 4], &[2, 2]), [vec![0, 1], vec![2, 3]]);
    }

    #[test]
    fn equal_loads_spread_over_many_partners() {
        let held = pack(&[1; 12], &[2; 12], &[6; 4]);
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
        let held = pack(&[100, 5, 5, 2], &[1, 1, 1, 2], &[3, 2]);
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
            let mut filled = Shards::new(&share, &room);
            filled.fill(&copies);
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
