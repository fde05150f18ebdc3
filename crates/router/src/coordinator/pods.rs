//! What the operator knows of the model's pods, and what follows from it for members.
//!
//! A member whose pod is withdrawn is shown as draining. A member whose pod is gone is removed, which
//! repairs a missed death; whether a pod that a view does not name is gone takes care, because a view may
//! be older than the pod:
//! - a pod that an earlier view named and a later one does not is gone for good: uids are never used again.
//!   Its member is removed at once and not admitted again.
//! - a pod that no view has named yet is taken for gone only by a view that came [`GRACE`] after its member
//!   had registered: the pod existed then, and an operator that sends views has seen it by then.
//!
//! The end of the operator's stream changes nothing: the last view stays, and no view comes that could
//! remove anybody.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use cadre_types::{OperatorView, PodRef, PodView};
use tokio::time::Instant;

/// How far an operator's view may lag behind the pods. Watches lag by milliseconds; a relist of a large
/// cluster behind a busy API server takes seconds.
pub(super) const GRACE: Duration = Duration::from_secs(15);

/// Pods remembered as gone; more than a model has, and than leave while a member takes to notice.
const GONE: usize = 4096;

/// The operator's pods.
#[derive(Debug, Default)]
pub(super) struct Pods {
    /// Sorted by uid.
    pods: Vec<PodView>,
    received: Option<Instant>,
    gone: BTreeSet<String>,
    /// The same, oldest first.
    gone_order: VecDeque<String>,
}

impl Pods {
    /// Takes a whole view.
    pub(super) fn take(&mut self, now: Instant, view: &OperatorView) {
        let before = std::mem::replace(&mut self.pods, view.pods.clone());
        self.received = Some(now);
        for pod in before {
            if self.find(&pod.pod.uid).is_none() && self.gone.insert(pod.pod.uid.clone()) {
                self.gone_order.push_back(pod.pod.uid);
            }
        }
        while self.gone_order.len() > GONE {
            if let Some(oldest) = self.gone_order.pop_front() {
                self.gone.remove(&oldest);
            }
        }
    }

    fn find(&self, uid: &str) -> Option<&PodView> {
        self.pods.binary_search_by(|pod| pod.pod.uid.as_str().cmp(uid)).ok().map(|at| &self.pods[at])
    }

    /// When the last view came.
    pub(super) fn received(&self) -> Option<Instant> {
        self.received
    }

    pub(super) fn is_withdrawn(&self, pod: Option<&PodRef>) -> bool {
        pod.and_then(|pod| self.find(&pod.uid)).is_some_and(|pod| pod.withdrawn)
    }

    pub(super) fn domain(&self, pod: Option<&PodRef>) -> Option<&str> {
        pod.and_then(|pod| self.find(&pod.uid)).and_then(|pod| pod.domain.as_deref())
    }

    /// Whether the pod is known to be gone, for a member that wants to register.
    pub(super) fn is_gone(&self, pod: Option<&PodRef>) -> bool {
        pod.is_some_and(|pod| self.gone.contains(&pod.uid))
    }

    /// Whether the last view removes a member that has been registered since then.
    pub(super) fn removes(&self, pod: Option<&PodRef>, registered: Instant) -> bool {
        let (Some(pod), Some(received)) = (pod, self.received) else { return false };
        self.gone.contains(&pod.uid) || (self.find(&pod.uid).is_none() && received >= registered + GRACE)
    }
}

#[cfg(test)]
mod tests {
    use cadre_types::Layout;

    use super::*;

    fn pod(uid: &str) -> PodRef {
        PodRef { name: format!("pod-{uid}"), uid: uid.into() }
    }

    fn view(uids: &[&str]) -> OperatorView {
        let layout = Layout { shards: 1, redundant_slots: 0, min_copies: 1 };
        let on = |uid: &&str| PodView { pod: pod(uid), domain: Some("n".into()), withdrawn: *uid == "w" };
        OperatorView { layout, pods: uids.iter().map(on).collect() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_was_seen_and_is_not_any_more_is_gone_at_once_and_for_good() {
        let (start, mut pods) = (Instant::now(), Pods::default());
        pods.take(start, &view(&["a", "b"]));
        assert!(!pods.removes(Some(&pod("a")), start));
        pods.take(start, &view(&["b"]));
        assert!(pods.removes(Some(&pod("a")), start), "registered just now, and still gone");
        assert!(pods.is_gone(Some(&pod("a"))));
        assert!(!pods.removes(Some(&pod("b")), start));
        assert!(!pods.removes(None, start), "members without a pod are never touched");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_was_never_seen_has_a_grace() {
        let (start, mut pods) = (Instant::now(), Pods::default());
        let new = pod("new");
        pods.take(start + GRACE - Duration::from_millis(1), &view(&["b"]));
        assert!(!pods.removes(Some(&new), start), "the view may be older than the pod");
        assert!(!pods.is_gone(Some(&new)));
        pods.take(start + GRACE, &view(&["b"]));
        assert!(pods.removes(Some(&new), start));
        assert!(!Pods::default().removes(Some(&new), start), "without a view nobody is removed");
    }

    #[tokio::test(start_paused = true)]
    async fn withdrawal_and_domain_are_those_of_the_last_view() {
        let mut pods = Pods::default();
        pods.take(Instant::now(), &view(&["a", "w"]));
        assert!(pods.is_withdrawn(Some(&pod("w"))) && !pods.is_withdrawn(Some(&pod("a"))));
        assert_eq!((pods.domain(Some(&pod("a"))), pods.domain(Some(&pod("x")))), (Some("n"), None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_remembered_as_gone_is_bounded() {
        let mut pods = Pods::default();
        for index in 0..GONE + 10 {
            pods.take(Instant::now(), &view(&[&format!("{index:06}")]));
        }
        assert_eq!((pods.gone.len(), pods.gone_order.len()), (GONE, GONE));
        assert!(!pods.is_gone(Some(&pod("000000"))) && pods.is_gone(Some(&pod("000020"))));
    }
}
