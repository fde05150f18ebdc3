//! `Ready`: the model answers requests. Its reason is what keeps it from that: the fault of the part that is missing
//! if one is known, else that it is still starting, else the missing part itself.

use cadre_k8s_api::{Reason, Tier};
use cadre_types::{CoordinatorStatus, Role};

use super::{Judged, Verdict};
use crate::plan::{
    component::Component,
    findings::{self, Finding},
    pods::OurPod,
};

impl Judged<'_, '_> {
    pub(super) fn ready(&self) -> Verdict {
        let router_up = self.facts.active(Component::Router).any(OurPod::has_started);
        let Some(word) = self.facts.word() else {
            return self.unheard(router_up);
        };
        if self.facts.present().is_none() && !router_up {
            return self.lacking(
                Component::Router,
                Reason::RouterUnavailable,
                "no router pod runs".to_owned(),
            );
        }
        if word.serving {
            return match self.facts.active(Component::Router).any(OurPod::is_ready) {
                true => Verdict::new("True", Reason::AsSpecified, "the model answers requests"),
                false => self.lacking(
                    Component::Router,
                    Reason::RouterUnavailable,
                    "the router takes requests, but its pod is not ready, so its Services lead nowhere"
                        .to_owned(),
                ),
            };
        }
        self.idle(word)
    }

    fn unheard(&self, router_up: bool) -> Verdict {
        if !router_up {
            return self.lacking(
                Component::Router,
                Reason::RouterUnavailable,
                "no router pod runs".to_owned(),
            );
        }
        let why = self.facts.unreachable().unwrap_or_default();
        let found = self.findings.iter().any(|finding| finding.reason == Reason::CoordinatorUnreachable);
        if self.is_starting() && !found {
            return Verdict::new("False", Reason::Starting, "the router has just started");
        }
        // Requests may well be answered; nobody here knows.
        let message = format!("the coordinator does not answer the operator: {why}");
        Verdict::new("Unknown", Reason::CoordinatorUnreachable, message)
    }

    /// Why the router takes no requests.
    fn idle(&self, word: &CoordinatorStatus) -> Verdict {
        let experts = Component::Tier(Tier::Experts);
        if word.generation.epoch.0 == 0 {
            let waits = word.next.as_ref().map(|next| next.waiting_for.as_str()).unwrap_or("shards");
            let message = format!("no placement is in force: {waits}");
            return self.lacking(experts, Reason::ExpertUncovered, message);
        }
        if word.coverage.uncovered > 0 {
            return self.lacking(experts, Reason::ExpertUncovered, super::covered::uncovered(&word.coverage));
        }
        if self.wants.decode_workers(self.facts.spec()) == 0 {
            let message = "the model is paused: decode has 0 replicas";
            return Verdict::new("False", Reason::NoDecodeWorker, message);
        }
        let has = |roles: &[Role]| {
            word.members.iter().any(|member| member.routable && roles.contains(&member.member.role))
        };
        if !has(&[Role::Decode, Role::Both]) {
            let message = "no decode worker is routable".to_owned();
            return self.lacking(Component::Tier(Tier::Decode), Reason::NoDecodeWorker, message);
        }
        if !has(&[Role::Both, Role::Prefill]) {
            let message = "no prefill worker is routable".to_owned();
            return self.lacking(Component::Tier(Tier::Prefill), Reason::NoPrefillWorker, message);
        }
        let message = "the router takes no requests now".to_owned();
        self.lacking(Component::Router, Reason::RouterUnavailable, message)
    }

    /// A part is missing; the reason is the most telling one known.
    fn lacking(&self, component: Component, symptom: Reason, message: String) -> Verdict {
        let blocking = || self.findings.iter().filter(|finding| finding.blocks());
        let concerns = |finding: &&Finding| finding.component.is_none_or(|of| of == component);
        let mut causes: Vec<&Finding> = blocking().filter(concerns).collect();
        if causes.is_empty() && self.is_starting() {
            causes = blocking().collect();
        }
        if let Some(cause) = causes.first() {
            return Verdict::new("False", cause.reason, format!("{message}; {}", findings::summary(&causes)));
        }
        if self.is_starting() {
            let reason = if self.is_loading() { Reason::LoadingWeights } else { Reason::Starting };
            return Verdict::new("False", reason, message);
        }
        Verdict::new("False", symptom, message)
    }
}
