//! The coordinator of the cluster: who is registered, which layout is in force, what is routable; and the kubelets'
//! probes, which follow from it.

use super::*;
use crate::observed::CoordinatorReport;
use cadre_types::{
    CoordinatorStatus, Coverage, CoverageExample, Generation, LayerId, Layout, LoadProgress, LogicalExpert,
    Member, MemberDevice, MemberId, MemberState, MemberStatus, ModelHash, NextLayout, NumericsClass,
    PlacementEpoch, PodRef, Role, ShardIndex,
};

/// What it knows, and what the tests break.
#[derive(Debug, Default)]
pub(in super::super) struct Coordinator {
    pub(in super::super) in_force: Option<Layout>,
    pub(in super::super) epoch: u64,
    /// The operator's stream breaks.
    pub(in super::super) unreachable: bool,
    /// New layouts do not come into force.
    pub(in super::super) stuck: bool,
    /// Tokens routed, if there is traffic.
    pub(in super::super) imbalance: Option<f64>,
    /// What members say they compute on.
    pub(in super::super) device: Option<MemberDevice>,
    /// Workers beside shards do not prove themselves.
    pub(in super::super) broken_beside: bool,
    routable: Vec<String>,
    router: Option<String>,
}

impl Coordinator {
    pub(in super::super) fn is_routable(&self, pod: &Pod) -> bool {
        self.routable.contains(pod.metadata.uid.as_ref().unwrap())
    }

    /// One step: members, layouts, probes, and the status for the operator.
    pub(super) fn follow(&mut self, seen: &mut Observed, view: Option<&OperatorView>) {
        let router = seen.pods.iter().find(|pod| runs(pod) && is_found(seen, pod)).cloned();
        let Some(router) = router else {
            self.routable.clear();
            self.router = None;
            probe(seen, |_| false);
            lose(seen, "connection refused");
            return;
        };
        let weights = checkpoint(&router);
        let members: Vec<Pod> = seen
            .pods
            .iter()
            .filter(|pod| component_of(pod) != "router" && runs(pod) && checkpoint(pod) == weights)
            .cloned()
            .collect();
        if self.router.replace(weights.clone()).is_some_and(|before| before != weights) {
            self.in_force = None;
        }
        if !self.unreachable
            && let Some(view) = view
        {
            self.advance(view, &members);
        }
        let withdrawn = |pod: &Pod| {
            let told = view.into_iter().flat_map(|view| &view.pods);
            told.into_iter().any(|known| Some(&known.pod.uid) == pod.metadata.uid.as_ref() && known.withdrawn)
        };
        let shards = self.in_force.map_or(0, |layout| layout.shards);
        let placed = |pod: &Pod| shard(pod).map_or(shards > 0, |shard| shard < shards);
        let routable = members.iter().filter(|pod| placed(pod) && !withdrawn(pod));
        self.routable = routable.map(|pod| pod.metadata.uid.clone().unwrap()).collect();
        let status = self.status(&members, view.map(|view| view.layout));
        let serving = status.serving;
        let up = self.routable.clone();
        probe(seen, |pod| match component_of(pod) {
            "router" => serving && pod.metadata.uid == router.metadata.uid,
            _ => up.contains(pod.metadata.uid.as_ref().unwrap()),
        });
        if self.unreachable {
            return lose(seen, "deadline exceeded");
        }
        seen.coordinator = Some(CoordinatorReport { status, heard: seen.now, connected: Ok(()) });
    }

    fn advance(&mut self, view: &OperatorView, members: &[Pod]) {
        let wanted = view.layout;
        let here = |shard: u16| members.iter().any(|pod| self::shard(pod) == Some(shard));
        if self.in_force != Some(wanted) && !self.stuck && (0..wanted.shards).all(here) {
            self.in_force = Some(wanted);
            self.epoch += 1;
        }
    }

    fn status(&self, members: &[Pod], wanted: Option<Layout>) -> CoordinatorStatus {
        let members: Vec<MemberStatus> = members.iter().flat_map(|pod| self.members(pod)).collect();
        let layout =
            self.in_force.or(wanted).unwrap_or(Layout { shards: 0, redundant_slots: 0, min_copies: 1 });
        let waits = wanted.filter(|wanted| self.in_force != Some(*wanted));
        let next = waits.map(|layout| NextLayout {
            layout,
            epoch: None,
            waiting_for: "shards have not registered".into(),
        });
        let coverage = self.coverage();
        let has = |roles: &[Role]| members.iter().any(|one| one.routable && roles.contains(&one.member.role));
        let generates = has(&[Role::Both]) || (has(&[Role::Decode]) && has(&[Role::Prefill]));
        CoordinatorStatus {
            generation: Generation {
                model: ModelHash([7; 16]),
                numerics: NumericsClass::Bf16,
                epoch: PlacementEpoch(if self.in_force.is_some() { self.epoch } else { 0 }),
            },
            layout,
            next,
            serving: self.in_force.is_some() && coverage.uncovered == 0 && generates,
            members,
            coverage,
            imbalance: self.imbalance,
        }
    }

    /// The worst case: an expert has its copies on just those shards that are gone.
    fn coverage(&self) -> Coverage {
        let Some(layout) = self.in_force else { return Coverage::default() };
        let up = u16::try_from(self.routable.iter().filter(|uid| uid.starts_with("shard")).count()).unwrap();
        let gone = layout.shards.saturating_sub(up);
        let copies = layout.min_copies.saturating_sub(gone);
        let reason = if copies == 0 {
            "no routable copy".into()
        } else {
            format!("{copies} of {} copies", layout.min_copies)
        };
        let example =
            CoverageExample { layer: LayerId(3), expert: LogicalExpert(7), copies: copies.into(), reason };
        Coverage {
            experts: 64,
            uncovered: u64::from(copies == 0),
            at_risk: u64::from(copies > 0 && gone > 0),
            examples: if gone > 0 { vec![example] } else { Vec::new() },
        }
    }

    /// A shard, a worker, or both.
    fn members(&self, pod: &Pod) -> Vec<MemberStatus> {
        let own = self.member(pod);
        let args = pod.spec.as_ref().unwrap().containers[0].args.clone().unwrap();
        if !matches!(own.member.role, Role::Expert(_)) || args[0] != "worker" {
            return vec![own];
        }
        let mut worker = MemberStatus { loading: None, ..own.clone() };
        worker.member.role = if args.iter().any(|arg| arg == "both") { Role::Both } else { Role::Decode };
        worker.member.id = MemberId(format!("worker-{}", own.member.id.0));
        worker.routable &= !self.broken_beside;
        vec![own, worker]
    }

    fn member(&self, pod: &Pod) -> MemberStatus {
        let uid = pod.metadata.uid.clone().unwrap();
        let routable = self.routable.contains(&uid);
        let state = match (routable, pod.metadata.deletion_timestamp.is_some()) {
            (_, true) => MemberState::Draining,
            (true, _) => MemberState::Ready,
            (false, _) => MemberState::Starting,
        };
        let role = role(pod);
        let read = LoadProgress { bytes_read: if routable { 100 } else { 40 }, bytes_expected: 100 };
        let id = MemberId(format!("member-{uid}"));
        let pod = Some(PodRef { name: name(&pod.metadata), uid });
        MemberStatus {
            member: Member { id, role, address: "10.0.0.1:1".into(), state, pod },
            routable,
            applied: PlacementEpoch(self.epoch),
            loading: matches!(role, Role::Expert(_)).then_some(read),
            sequences: 0,
            stranger: None,
            device: self.device.clone(),
            failed_proof: None,
        }
    }
}

/// The name of the coordinator leads to this pod, or its members are still with it: it drains.
fn is_found(seen: &Observed, pod: &Pod) -> bool {
    let service = seen
        .children
        .services
        .iter()
        .find(|one| one.metadata.name.as_deref().is_some_and(|name| name.ends_with("-coordinator")));
    let selector = service.and_then(|service| service.spec.as_ref()?.selector.as_ref());
    let labels = pod.metadata.labels.as_ref().unwrap();
    let drains = component_of(pod) == "router" && pod.metadata.deletion_timestamp.is_some();
    drains || selector.is_some_and(|all| all.iter().all(|(key, value)| labels.get(key) == Some(value)))
}

/// The stream breaks; what was said stays known.
fn lose(seen: &mut Observed, why: &str) {
    if let Some(report) = &mut seen.coordinator {
        report.connected = Err(why.into());
    }
}

/// Readiness: what the process says, and for members the gate.
fn probe(seen: &mut Observed, serves: impl Fn(&Pod) -> bool) {
    for pod in &mut seen.pods {
        let serves = runs(pod) && serves(pod);
        let Some(statuses) = pod.status.as_mut().and_then(|status| status.container_statuses.as_mut()) else {
            continue;
        };
        statuses[0].ready = serves;
        let gated = component_of(pod) != "router";
        let gate = pod.status.iter().filter_map(|status| status.conditions.as_ref()).flatten();
        let open = gate.into_iter().any(|one| one.type_ == ROUTABLE_GATE && one.status == "True");
        set_condition(pod, "Ready", serves && (open || !gated));
    }
}

fn runs(pod: &Pod) -> bool {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    statuses.is_some_and(|all| all[0].state.as_ref().is_some_and(|state| state.running.is_some()))
}

fn checkpoint(pod: &Pod) -> String {
    pod.metadata.labels.as_ref().unwrap()[label::CHECKPOINT].clone()
}

fn shard(pod: &Pod) -> Option<u16> {
    match role(pod) {
        Role::Expert(shard) => Some(shard.0),
        _ => None,
    }
}

fn role(pod: &Pod) -> Role {
    match component_of(pod) {
        "experts" => {
            Role::Expert(ShardIndex(name(&pod.metadata).rsplit_once('-').unwrap().1.parse().unwrap()))
        }
        "prefill" => Role::Prefill,
        _ => {
            let args = pod.spec.as_ref().unwrap().containers[0].args.clone().unwrap();
            if args.iter().any(|arg| arg == "both") { Role::Both } else { Role::Decode }
        }
    }
}
