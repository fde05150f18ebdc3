//! The pool of KV pages.
//!
//! A page is in exactly one place: the free list or one [`BlockTable`]. The type makes that so: tables are
//! made only by [`PagePool::allocate`], cannot be copied, and are consumed by [`PagePool::release`], so a
//! page can be neither freed twice nor held by two sequences. The pool is private to the crate, and a
//! scheduler has one, so a table cannot go back to a pool it did not come from.
//! Pages are taken last-freed first: those are the ones still in the CPU's caches.

use cadre_types::PageId;

/// Tokens per page (FlashMLA's page; spec §4). Equals `KvLayout::PAGE_TOKENS` of cadre-ops.
pub const PAGE_TOKENS: usize = 64;

/// Pages that hold `tokens` positions.
pub fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// The pages of one sequence: entry `i` holds positions `64 i .. 64 i + 64`. Empty while it waits.
#[derive(Debug, Default)]
#[must_use = "a table that is dropped takes its pages with it; release it"]
pub struct BlockTable {
    pages: Vec<PageId>,
}

impl BlockTable {
    /// The pages in order of position.
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// Positions that the pages hold.
    pub fn capacity_tokens(&self) -> usize {
        self.pages.len() * PAGE_TOKENS
    }
}

/// Too few free pages for a reservation at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{requested} KV pages wanted, {free} of {total} are free")]
pub struct PagesExhausted {
    /// Pages wanted.
    pub requested: usize,
    /// Pages free.
    pub free: usize,
    /// Pages of the pool.
    pub total: usize,
}

/// Every page of one KV cache.
#[derive(Debug)]
pub(crate) struct PagePool {
    free: Vec<PageId>,
    total: usize,
}

impl PagePool {
    pub(crate) fn new(total: u32) -> Self {
        // Reversed, so that a fresh pool hands out page 0 first.
        Self { free: (0..total).rev().map(PageId).collect(), total: total as usize }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes `pages` pages, or none.
    pub(crate) fn allocate(&mut self, pages: usize) -> Result<BlockTable, PagesExhausted> {
        match self.free.len().checked_sub(pages) {
            Some(rest) => Ok(BlockTable { pages: self.free.drain(rest..).rev().collect() }),
            None => Err(PagesExhausted { requested: pages, free: self.free.len(), total: self.total }),
        }
    }

    /// Takes a table's pages back.
    pub(crate) fn release(&mut self, table: BlockTable) {
        self.free.extend(table.pages.into_iter().rev());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pages_round_up() {
        assert_eq!([0, 1, 64, 65, 128].map(pages_for), [0, 1, 1, 2, 2]);
    }

    #[test]
    fn exhaustion_names_its_numbers_and_takes_nothing() {
        let mut pool = PagePool::new(3);
        let held = pool.allocate(2).unwrap();
        let refused = pool.allocate(2).unwrap_err();
        assert_eq!(refused, PagesExhausted { requested: 2, free: 1, total: 3 });
        assert_eq!(refused.to_string(), "2 KV pages wanted, 1 of 3 are free");
        assert_eq!(pool.free(), 1);
        pool.release(held);
        assert_eq!(pool.free(), 3);
    }

    #[test]
    fn a_freed_table_is_the_next_one_given() {
        let mut pool = PagePool::new(8);
        let first = pool.allocate(3).unwrap();
        assert_eq!(first.pages(), [PageId(0), PageId(1), PageId(2)]);
        pool.release(first);
        let again = pool.allocate(2).unwrap();
        assert_eq!(again.pages(), [PageId(0), PageId(1)]);
        assert_eq!(again.capacity_tokens(), 128);
    }

    proptest! {
        #[test]
        fn every_page_is_free_or_in_one_table(
            total in 0u32..40,
            calls in prop::collection::vec((any::<bool>(), 0usize..12), 0..80),
        ) {
            let mut pool = PagePool::new(total);
            let mut tables: Vec<BlockTable> = Vec::new();
            for (allocate, number) in calls {
                let free = pool.free();
                if allocate {
                    match pool.allocate(number) {
                        Ok(table) => {
                            prop_assert_eq!(table.pages().len(), number);
                            tables.push(table);
                        }
                        Err(refused) => prop_assert!(refused.requested > free),
                    }
                } else if number < tables.len() {
                    pool.release(tables.swap_remove(number));
                }
                let held: Vec<PageId> =
                    tables.iter().flat_map(|table| table.pages().iter().copied()).collect();
                let everywhere: BTreeSet<PageId> =
                    held.iter().chain(&pool.free).copied().collect();
                prop_assert_eq!(held.len() + pool.free(), total as usize);
                prop_assert_eq!(everywhere, (0..total).map(PageId).collect::<BTreeSet<_>>());
            }
        }
    }
}
