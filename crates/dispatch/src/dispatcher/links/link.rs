//! The link to one shard: a connection to each of its members, one of which is used.
//!
//! A shard has two members while its process is replaced, and more when somebody registers who cannot be reached. All
//! are connected to. The one that is used stays while it is ready and its stream is up; else the first that is both
//! takes its place, and one that fails its frames makes room for the next. The order of ids decides nothing.

use std::sync::Arc;

use crate::transport::DispatchTransport;

/// Members of one shard that are connected to: the one that serves, its successor, and two that may be wrong.
pub(super) const MAX_CANDIDATES: usize = 4;

/// The members of one shard; at least one.
pub(super) struct Link {
    candidates: Vec<Candidate>,
    current: usize,
    /// Whether frames could go out at the last look.
    pub(super) was_up: bool,
}

struct Candidate {
    transport: Arc<dyn DispatchTransport>,
    address: String,
    /// Listed as ready; a shard that disappears from the view keeps its last word, because a restarting
    /// coordinator lists nobody at first and the data plane goes on without it.
    ready: bool,
    listed: bool,
}

/// A member as a view lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listed<'a> {
    pub(super) address: &'a str,
    pub(super) ready: bool,
}

impl Link {
    /// A link to the members of a shard that was not listed before; `None` if there is none.
    pub(super) fn new(
        listed: &[Listed<'_>],
        connect: impl FnMut(&str) -> Arc<dyn DispatchTransport>,
    ) -> Option<Self> {
        let mut link = Self { candidates: Vec::new(), current: 0, was_up: false };
        link.relist(listed, connect);
        (!link.candidates.is_empty()).then_some(link)
    }

    /// Follows a view. True if another member is used than before.
    pub(super) fn relist(
        &mut self,
        listed: &[Listed<'_>],
        mut connect: impl FnMut(&str) -> Arc<dyn DispatchTransport>,
    ) -> bool {
        for candidate in &mut self.candidates {
            let now = listed.iter().find(|member| member.address == candidate.address);
            candidate.listed = now.is_some();
            candidate.ready = now.map_or(candidate.ready, |member| member.ready);
        }
        if listed.is_empty() {
            return false;
        }
        let before = self.address().map(str::to_owned);
        // Outstanding frames of those that go fail as disconnected.
        self.candidates.retain(|candidate| candidate.listed);
        let known = |link: &Self, member: &Listed<'_>| {
            link.candidates.iter().any(|candidate| candidate.address == member.address)
        };
        // Ready ones first; of those that are connected to already, one that is not ready makes room for them.
        let (ready, others): (Vec<_>, Vec<_>) = listed.iter().partition(|member| member.ready);
        for member in ready.into_iter().chain(others) {
            if known(self, member) {
                continue;
            }
            if self.candidates.len() >= MAX_CANDIDATES {
                let unready = self.candidates.iter().position(|candidate| !candidate.ready);
                let Some(unready) = unready.filter(|_| member.ready) else { continue };
                self.candidates.remove(unready);
            }
            self.candidates.push(Candidate {
                transport: connect(member.address),
                address: member.address.to_owned(),
                ready: member.ready,
                listed: true,
            });
        }
        let same = self.candidates.iter().position(|candidate| Some(&candidate.address) == before.as_ref());
        self.current = same.unwrap_or(0);
        self.choose();
        before.as_deref() != self.address()
    }

    /// Uses another member if the one that is used cannot be and another can. True if it does.
    pub(super) fn choose(&mut self) -> bool {
        !self.current().is_some_and(Candidate::usable) && self.next()
    }

    /// Uses the next member that is ready and up, for the one that is used has failed. True if there is one.
    pub(super) fn next(&mut self) -> bool {
        let count = self.candidates.len();
        let usable = |at: &usize| self.candidates[*at].usable();
        match (1..count).map(|step| (self.current + step) % count).find(usable) {
            Some(next) => {
                self.current = next;
                true
            }
            None => false,
        }
    }

    /// Whether the shard is listed at all; marks it as not listed any more, and says whether it was.
    pub(super) fn unlist(&mut self) -> bool {
        let was = self.candidates.iter().any(|candidate| candidate.listed);
        self.candidates.iter_mut().for_each(|candidate| candidate.listed = false);
        was
    }

    fn current(&self) -> Option<&Candidate> {
        self.candidates.get(self.current)
    }

    pub(super) fn transport(&self) -> Option<&Arc<dyn DispatchTransport>> {
        self.current().map(|candidate| &candidate.transport)
    }

    pub(super) fn address(&self) -> Option<&str> {
        self.current().map(|candidate| candidate.address.as_str())
    }

    pub(super) fn is_up(&self) -> bool {
        self.current().is_some_and(|candidate| candidate.transport.is_up())
    }

    pub(super) fn is_ready(&self) -> bool {
        self.current().is_some_and(|candidate| candidate.ready)
    }
}

impl Candidate {
    fn usable(&self) -> bool {
        self.ready && self.transport.is_up()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::{frame::DispatchFrame, transport::Reply};

    #[derive(Default)]
    struct Line {
        up: AtomicBool,
    }

    impl DispatchTransport for Line {
        fn send(&self, _frame: DispatchFrame, _reply: Reply) {}

        fn is_up(&self) -> bool {
            self.up.load(Ordering::Relaxed)
        }
    }

    /// Connections by address, made when first asked for.
    #[derive(Default)]
    struct Lines(Vec<(String, Arc<Line>)>);

    impl Lines {
        fn connect(&mut self, address: &str) -> Arc<dyn DispatchTransport> {
            let line = Arc::<Line>::default();
            self.0.push((address.to_owned(), line.clone()));
            line
        }

        fn set(&self, address: &str, up: bool) {
            let lines = self.0.iter().filter(|(known, _)| known == address);
            lines.for_each(|(_, line)| line.up.store(up, Ordering::Relaxed));
        }
    }

    fn ready<'a>(addresses: &[&'a str]) -> Vec<Listed<'a>> {
        addresses.iter().map(|address| Listed { address, ready: true }).collect()
    }

    fn used(link: &Link) -> (&str, bool) {
        (link.address().unwrap_or_default(), link.is_ready() && link.is_up())
    }

    #[test]
    fn a_member_that_cannot_be_reached_shadows_nobody_in_either_order() {
        for listed in [["well", "dead"], ["dead", "well"]] {
            let mut lines = Lines::default();
            let link = Link::new(&ready(&listed), |address| lines.connect(address));
            let mut link = link.expect("two members");
            lines.set("well", true);
            link.choose();
            assert_eq!(used(&link), ("well", true), "{listed:?}");
            // And one that comes later changes nothing.
            assert!(
                !link.relist(&ready(&["another", listed[0], listed[1]]), |address| lines.connect(address))
            );
            assert_eq!(used(&link), ("well", true), "{listed:?}");
            assert_eq!(lines.0.len(), 3, "nobody is connected to twice");
        }
    }

    #[test]
    fn one_that_fails_its_frames_makes_room_for_the_next() {
        let mut lines = Lines::default();
        let mut link = Link::new(&ready(&["mute", "well"]), |address| lines.connect(address)).expect("two");
        lines.set("mute", true);
        lines.set("well", true);
        assert!(!link.choose() && used(&link) == ("mute", true));
        assert!(link.next() && used(&link) == ("well", true));
        lines.set("mute", false);
        assert!(!link.next(), "there is no other");
        assert_eq!(used(&link), ("well", true));
    }

    #[test]
    fn a_successor_takes_over_when_the_old_one_drains_and_the_last_word_stays() {
        let mut lines = Lines::default();
        let mut link = Link::new(&ready(&["old"]), |address| lines.connect(address)).expect("one");
        lines.set("old", true);
        let both = [Listed { address: "new", ready: false }, Listed { address: "old", ready: true }];
        assert!(!link.relist(&both, |address| lines.connect(address)));
        lines.set("new", true);
        let flipped = [Listed { address: "new", ready: true }, Listed { address: "old", ready: false }];
        assert!(link.relist(&flipped, |address| lines.connect(address)));
        assert_eq!(used(&link), ("new", true));
        // A coordinator that has just restarted lists nobody.
        assert!(link.unlist() && !link.unlist());
        assert!(!link.relist(&[], |address| lines.connect(address)));
        assert_eq!(used(&link), ("new", true));
        assert!(Link::new(&[], |address| lines.connect(address)).is_none());
    }

    #[test]
    fn connections_are_bounded_and_ready_members_have_them_first() {
        let mut lines = Lines::default();
        let names: Vec<String> = (0..9).map(|index| index.to_string()).collect();
        let starting: Vec<Listed<'_>> =
            names.iter().map(|name| Listed { address: name, ready: false }).collect();
        let mut link = Link::new(&starting, |address| lines.connect(address)).expect("many");
        assert_eq!(link.candidates.len(), MAX_CANDIDATES);
        let mut last_is_ready = starting.clone();
        last_is_ready[8].ready = true;
        link.relist(&last_is_ready, |address| lines.connect(address));
        lines.set("8", true);
        assert!(link.choose());
        assert_eq!((used(&link), link.candidates.len()), (("8", true), MAX_CANDIDATES));
    }
}
