//! What the operator knows of the model's pods, and what follows from it for members.
//!
//! A member whose pod is withdrawn is shown as draining. A member whose pod is gone is removed, which repairs a
//! missed death. A member that the operator does not know is a [`Stranger`]: its pod is not among those of the
//! last view, or it is at another address than its pod.
//! - While an operator is attached no stranger is admitted; it may try again, because the view may be older than
//!   the pod. While none is, new members are admitted: pods are replaced without it.
//! - A stranger that was there before is removed by a view that came [`GRACE`] after it had registered: its pod
//!   existed then, and an operator that sends views has seen it by then.
//! - A pod that an earlier view named and a later one does not is gone: its member is removed at once and not
//!   admitted again, unless a later view names the pod once more (a view may have been wrong).
//!
//! A view without pods says nothing about pods: a model whose pods are all gone has no members to remove, and
//! an operator that has not looked yet must not empty a cluster. The end of the operator's stream removes nobody.

use std::{
    collections::{BTreeSet, VecDeque},
    net::IpAddr,
    time::Duration,
};

use cadre_types::{HostPort, Member, OperatorView, PodRef, PodView};
use tokio::time::Instant;

/// How far an operator's view may lag behind the pods. Watches lag by milliseconds; a relist of a large
/// cluster behind a busy API server takes seconds.
pub(super) const GRACE: Duration = Duration::from_secs(15);

/// Pods remembered as gone; more than a model has, and than leave while a member takes to notice.
const GONE: usize = 4096;

/// Why the operator does not know a member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Stranger {
    /// Only processes in pods can be known.
    #[error("it names no pod, and the model has an operator")]
    NoPod,
    /// No such pod.
    #[error("the operator's last view has no pod {} ({})", .0.name, .0.uid)]
    Unnamed(PodRef),
    /// It says that it is in a pod and listens elsewhere.
    #[error("{address} is not the address of its pod {} ({})", pod.name, pod.uid)]
    Elsewhere { pod: PodRef, address: String },
}

/// The operator's pods.
#[derive(Debug, Default)]
pub(super) struct Pods {
    /// Sorted by uid. Empty: the operator has said nothing about pods.
    pods: Vec<PodView>,
    /// The last view names addresses; that of an operator before it knew of them does not.
    addressed: bool,
    attached: bool,
    received: Option<Instant>,
    gone: BTreeSet<String>,
    /// The same, oldest first.
    gone_order: VecDeque<String>,
}

impl Pods {
    /// Takes a whole view.
    pub(super) fn take(&mut self, now: Instant, view: &OperatorView) {
        self.received = Some(now);
        self.attached = true;
        if view.pods.is_empty() {
            return;
        }
        let before = std::mem::replace(&mut self.pods, view.pods.clone());
        self.addressed = self.pods.iter().any(|pod| !pod.ips.is_empty());
        for pod in before {
            if self.find(&pod.pod.uid).is_none() && self.gone.insert(pod.pod.uid.clone()) {
                self.gone_order.push_back(pod.pod.uid);
            }
        }
        let Self { pods, gone, gone_order, .. } = self;
        for pod in pods {
            if gone.remove(&pod.pod.uid) {
                gone_order.retain(|uid| *uid != pod.pod.uid);
            }
        }
        while self.gone_order.len() > GONE {
            if let Some(oldest) = self.gone_order.pop_front() {
                self.gone.remove(&oldest);
            }
        }
    }

    /// The operator's stream has ended.
    pub(super) fn left(&mut self) {
        self.attached = false;
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

    /// Whether the pod is known to be gone.
    pub(super) fn is_gone(&self, pod: Option<&PodRef>) -> bool {
        pod.is_some_and(|pod| self.gone.contains(&pod.uid))
    }

    /// Why the operator does not know a member; `None` if it does, or has said nothing about pods.
    pub(super) fn stranger(&self, member: &Member) -> Option<Stranger> {
        if self.pods.is_empty() {
            return None;
        }
        let Some(pod) = &member.pod else { return Some(Stranger::NoPod) };
        let Some(known) = self.find(&pod.uid) else { return Some(Stranger::Unnamed(pod.clone())) };
        let ip = member.address.parse::<HostPort>().ok().and_then(|address| address.ip());
        let at_pod =
            |ip: IpAddr| known.ips.iter().any(|of_pod| of_pod.parse::<IpAddr>().is_ok_and(|of| of == ip));
        if self.addressed && !ip.is_some_and(at_pod) {
            return Some(Stranger::Elsewhere { pod: pod.clone(), address: member.address.clone() });
        }
        None
    }

    /// The same for a member that wants to register: while no operator is there it is given the benefit of the
    /// doubt.
    pub(super) fn unwelcome(&self, member: &Member) -> Option<Stranger> {
        if self.attached { self.stranger(member) } else { None }
    }

    /// Whether an operator is there that has named pods.
    pub(super) fn is_attached(&self) -> bool {
        self.attached && !self.pods.is_empty()
    }

    /// Whether the last view removes a member that has been registered since then.
    pub(super) fn removes(&self, member: &Member, registered: Instant) -> bool {
        let late = self.received.is_some_and(|received| received >= registered + GRACE);
        self.is_gone(member.pod.as_ref()) || (late && self.stranger(member).is_some())
    }
}

#[cfg(test)]
mod tests {
    use cadre_types::{Layout, MemberId, MemberState, Role};

    use super::*;

    fn pod(uid: &str) -> PodRef {
        PodRef { name: format!("pod-{uid}"), uid: uid.into() }
    }

    fn view(uids: &[&str]) -> OperatorView {
        let layout = Layout { shards: 1, redundant_slots: 0, min_copies: 1 };
        let on = |uid: &&str| PodView {
            pod: pod(uid),
            domain: Some("n".into()),
            withdrawn: *uid == "w",
            ips: Vec::new(),
        };
        OperatorView { layout, pods: uids.iter().map(on).collect() }
    }

    /// A view in which the pods have these addresses.
    fn at(pods: &[(&str, &[&str])]) -> OperatorView {
        let mut told = view(&pods.iter().map(|(uid, _)| *uid).collect::<Vec<_>>());
        for (pod, (_, ips)) in told.pods.iter_mut().zip(pods) {
            pod.ips = ips.iter().map(|ip| (*ip).to_owned()).collect();
        }
        told
    }

    fn member(pod: Option<PodRef>, address: &str) -> Member {
        let id = MemberId("m".into());
        Member { id, role: Role::Both, address: address.into(), state: MemberState::Ready, pod }
    }

    fn of(uid: &str) -> Member {
        member(Some(pod(uid)), "10.0.0.1:1")
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_was_seen_and_is_not_any_more_is_gone_at_once_until_it_is_named_again() {
        let (start, mut pods) = (Instant::now(), Pods::default());
        pods.take(start, &view(&["a", "b"]));
        assert!(!pods.removes(&of("a"), start));
        pods.take(start, &view(&["b"]));
        assert!(pods.removes(&of("a"), start), "registered just now, and still gone");
        assert!(pods.is_gone(Some(&pod("a"))));
        assert!(!pods.removes(&of("b"), start));
        pods.take(start, &view(&["a", "b"]));
        assert!(!pods.is_gone(Some(&pod("a"))) && !pods.removes(&of("a"), start), "the ban is lifted");
        assert!(pods.gone_order.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_view_without_pods_removes_nobody_and_bans_nobody() {
        let (start, mut pods) = (Instant::now(), Pods::default());
        for (at, before) in [(start, &["a", "b"][..]), (start + GRACE, &[])] {
            pods.take(at, &view(before));
            for late in [Duration::ZERO, GRACE, 10 * GRACE] {
                pods.take(at + late, &view(&[]));
                assert!(!pods.removes(&of("a"), start) && !pods.is_gone(Some(&pod("a"))));
                assert_eq!(pods.unwelcome(&of("b")), None);
            }
        }
        assert_eq!(pods.received(), Some(start + 11 * GRACE), "it is a view all the same");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_was_never_seen_has_a_grace() {
        let (start, mut pods) = (Instant::now(), Pods::default());
        let new = of("new");
        pods.take(start + GRACE - Duration::from_millis(1), &view(&["b"]));
        assert!(!pods.removes(&new, start), "the view may be older than the pod");
        assert!(!pods.is_gone(Some(&pod("new"))));
        pods.take(start + GRACE, &view(&["b"]));
        assert!(pods.removes(&new, start));
        assert!(pods.removes(&member(None, "10.0.0.1:1"), start), "and so has a process without one");
        assert!(!Pods::default().removes(&new, start), "without a view nobody is removed");
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_are_named_and_unwelcome_while_an_operator_is_there() {
        let mut pods = Pods::default();
        let nobody = member(None, "10.0.0.1:1");
        assert_eq!((pods.stranger(&nobody), pods.unwelcome(&nobody)), (None, None), "no operator");
        pods.take(Instant::now(), &at(&[("a", &["10.0.0.1", "fd00::1"]), ("b", &[])]));
        assert_eq!(pods.unwelcome(&nobody), Some(Stranger::NoPod));
        assert_eq!(pods.unwelcome(&of("x")), Some(Stranger::Unnamed(pod("x"))));
        for address in ["10.0.0.1:7", "[fd00:0::1]:7"] {
            assert_eq!(pods.unwelcome(&member(Some(pod("a")), address)), None, "{address}");
        }
        for (uid, address) in
            [("a", "10.0.0.9:7"), ("a", "[fd00::2]:7"), ("a", "name:7"), ("b", "10.0.0.1:1")]
        {
            let elsewhere = Stranger::Elsewhere { pod: pod(uid), address: address.to_owned() };
            assert_eq!(pods.unwelcome(&member(Some(pod(uid)), address)), Some(elsewhere));
        }
        pods.left();
        assert_eq!(pods.unwelcome(&of("x")), None, "pods are replaced while no operator is there");
        assert!(pods.stranger(&of("x")).is_some(), "and known as strangers");
        // One of an earlier version tells no addresses.
        pods.take(Instant::now(), &view(&["a"]));
        assert_eq!(pods.unwelcome(&member(Some(pod("a")), "name:7")), None);
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
