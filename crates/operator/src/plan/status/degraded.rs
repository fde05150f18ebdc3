//! `Degraded`: the model is less than the spec asks for, and not because it is on its way there.

use cadre_k8s_api::{ConditionType, Reason};

use super::{Judged, Verdict};
use crate::plan::{
    component::Component,
    findings::{self, Finding},
};

impl Judged<'_, '_> {
    pub(super) fn degraded(&self) -> Verdict {
        let found: Vec<&Finding> = self.findings.iter().collect();
        if let Some(first) = found.first() {
            return Verdict::new("True", first.reason, findings::summary(&found));
        }
        let missing = self.missing();
        if missing.is_empty() || !self.has_lost() {
            return Verdict::new("False", Reason::AsSpecified, "nothing is missing or failed");
        }
        let router = missing.iter().any(|(component, _)| *component == Component::Router);
        let reason = if router { Reason::RouterUnavailable } else { Reason::PodsMissing };
        let message = missing.into_iter().map(|(_, words)| words).collect::<Vec<_>>().join("; ");
        Verdict::new("True", reason, message)
    }

    /// Pods are missing that were there: nobody asked for more pods or others, and the model has been up.
    fn has_lost(&self) -> bool {
        let progressing = self.progressing();
        let asked_for = [Reason::Scaling, Reason::Updating].contains(&progressing.reason);
        let lost = [Reason::PodsMissing, Reason::RouterUnavailable].map(Reason::name);
        let was_lost = self
            .facts
            .condition(ConditionType::Degraded.name())
            .is_some_and(|known| known.status == "True" && lost.contains(&known.reason.as_str()));
        !self.is_starting() && (was_lost || !asked_for)
    }
}
