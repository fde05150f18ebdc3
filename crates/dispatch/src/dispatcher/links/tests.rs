#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Mutex, Weak};

use cadre_types::{Generation, LayerPlacement, Member, MemberId, ModelHash, NumericsClass, Placement};

use super::*;
use crate::transport::DispatchTransport;

struct Line;

impl DispatchTransport for Line {
    fn send(&self, _frame: DispatchFrame, _reply: Reply) {}

    fn is_up(&self) -> bool {
        true
    }
}

/// Remembers the links that it has made for as long as they live.
#[derive(Default)]
struct Connector(Mutex<Vec<(ShardIndex, Weak<Line>)>>);

impl Connector {
    /// Shards with a live link.
    fn live(&self) -> Vec<u16> {
        let made = self.0.lock().unwrap();
        made.iter().filter(|(_, line)| line.strong_count() > 0).map(|(shard, _)| shard.0).collect()
    }
}

impl Connect for Connector {
    fn connect(
        &self,
        shard: ShardIndex,
        _address: &str,
        _changed: Arc<dyn Fn() + Send + Sync>,
    ) -> Arc<dyn DispatchTransport> {
        let line = Arc::new(Line);
        self.0.lock().unwrap().push((shard, Arc::downgrade(&line)));
        line
    }
}

/// A view of so many shards, each with a ready member, in which placements from `oldest` on are in use.
fn view(epoch: u64, shards: u16, oldest: u64) -> Arc<ClusterView> {
    let slots = (0..shards).map(|shard| vec![LogicalExpert(shard)]).collect();
    let layers = vec![LayerPlacement { layer: LayerId(3), slots }];
    let placement = Placement::new(PlacementEpoch(epoch), usize::from(shards), layers).unwrap();
    let generation =
        Generation { model: ModelHash([1; 16]), numerics: NumericsClass::Bf16, epoch: PlacementEpoch(epoch) };
    let member = |shard: u16| Member {
        id: MemberId(format!("shard-{shard}")),
        role: Role::Expert(ShardIndex(shard)),
        address: format!("127.0.0.1:{}", 1000 + shard),
        state: MemberState::Ready,
        pod: None,
    };
    let mut view = ClusterView::settled(generation, Arc::new(placement), (0..shards).map(member).collect());
    view.oldest_epoch = PlacementEpoch(oldest);
    Arc::new(view)
}

#[test]
fn what_no_placement_in_use_has_is_dropped() {
    let connector = Arc::new(Connector::default());
    let stats = Arc::new(DispatchStats::default());
    let (mailbox, _events) = Mailbox::new();
    let mut links = Links::new(HealthPolicy::default(), connector.clone(), mailbox, Arc::clone(&stats));
    let now = Instant::now();
    assert!(links.follow(&view(1, 60, 1), now).is_empty());
    assert_eq!((connector.live().len(), links.health().len(), stats.shards().len()), (60, 60, 60));
    links.suspect(ShardIndex(59), LayerId(3), LogicalExpert(59));
    assert_eq!(stats.faults().len(), 1);

    // Frames of the old placement may be out: its links stay, though their members are listed no more.
    let expired = links.follow(&view(2, 4, 1), now);
    assert_eq!(expired, Vec::new(), "members beyond the placement say nothing of frames that are out");
    assert_eq!(connector.live().len(), 60);

    // Nobody is left on it.
    links.follow(&view(2, 4, 2), now);
    assert_eq!(connector.live(), [0, 1, 2, 3]);
    assert_eq!((links.health().len(), stats.shards().len()), (4, 4));
    assert!(stats.faults().is_empty(), "and nothing is said of its shards");

    // A shard that comes again is linked to again.
    links.follow(&view(3, 6, 3), now);
    assert_eq!(connector.live(), [0, 1, 2, 3, 4, 5]);
}
