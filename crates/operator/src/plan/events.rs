//! Events: one for each change of a condition's status or reason, none for anything else.
//!
//! A change that shows in several conditions at once (a pod that cannot be placed makes the model degraded and
//! keeps it from being ready) is told once.

use std::collections::BTreeSet;

use cadre_k8s_api::{ConditionType, MoEModelStatus, Reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::{Transition, status::cut};

/// The API server refuses longer notes.
const MAX_NOTE: usize = 1024;

/// What changed between two statuses.
pub(super) fn transitions(before: Option<&MoEModelStatus>, after: &MoEModelStatus) -> Vec<Transition> {
    let mut told = BTreeSet::new();
    let of = |status: Option<&MoEModelStatus>, type_: ConditionType| {
        status?.conditions.iter().find(|condition| condition.type_ == type_.name()).cloned()
    };
    ConditionType::ALL
        .into_iter()
        .filter_map(|type_| transition(type_, of(before, type_), of(Some(after), type_)?))
        .filter(|transition| told.insert(transition.reason.clone()))
        .collect()
}

fn transition(type_: ConditionType, before: Option<Condition>, after: Condition) -> Option<Transition> {
    let healthy = after.status == type_.healthy();
    let changed = match &before {
        Some(before) => before.status != after.status || before.reason != after.reason,
        // A new model: that nothing is wrong with it, or that nothing is known of it yet, is no news.
        None => !healthy && after.status != "Unknown",
    };
    if !changed {
        return None;
    }
    let reason = match (type_, healthy) {
        (ConditionType::Ready | ConditionType::ExpertsCovered, true) => type_.name(),
        _ => after.reason.as_str(),
    };
    Some(Transition {
        warning: !healthy && !is_progress(&after.reason),
        reason: reason.to_owned(),
        action: action(&after.reason).to_owned(),
        note: cut(after.message, MAX_NOTE),
    })
}

/// On its way, as it should be.
fn is_progress(reason: &str) -> bool {
    use Reason::{Deleting, LoadingWeights, Scaling, Starting, Updating};
    [Starting, LoadingWeights, Scaling, Updating, Deleting].iter().any(|known| known.name() == reason)
}

fn action(reason: &str) -> &'static str {
    let is = |known: Reason| known.name() == reason;
    if is(Reason::Starting) || is(Reason::LoadingWeights) {
        "Start"
    } else if is(Reason::Scaling) {
        "Scale"
    } else if is(Reason::Updating) {
        "Update"
    } else if is(Reason::Deleting) {
        "Delete"
    } else {
        "Observe"
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

    use super::*;

    fn status(conditions: &[(ConditionType, &str, Reason)]) -> MoEModelStatus {
        let condition = |(type_, status, reason): &(ConditionType, &str, Reason)| Condition {
            type_: type_.name().into(),
            status: (*status).into(),
            reason: reason.name().into(),
            message: format!("{} says so", type_.name()),
            observed_generation: Some(1),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
        };
        MoEModelStatus { conditions: conditions.iter().map(condition).collect(), ..MoEModelStatus::default() }
    }

    fn told(before: Option<&MoEModelStatus>, after: &MoEModelStatus) -> Vec<(bool, String, String)> {
        transitions(before, after).into_iter().map(|one| (one.warning, one.reason, one.action)).collect()
    }

    #[test]
    fn one_change_is_told_once_and_no_change_never() {
        use ConditionType::{Degraded, ExpertsCovered, Progressing, Ready};
        let new = status(&[
            (Ready, "False", Reason::Starting),
            (Progressing, "True", Reason::Starting),
            (Degraded, "False", Reason::AsSpecified),
            (ExpertsCovered, "Unknown", Reason::CoverageUnknown),
        ]);
        assert_eq!(told(None, &new), [(false, "Starting".into(), "Start".into())]);
        assert_eq!(told(Some(&new), &new), []);
        let broken = status(&[
            (Ready, "False", Reason::ImagePullFailed),
            (Progressing, "True", Reason::Starting),
            (Degraded, "True", Reason::ImagePullFailed),
            (ExpertsCovered, "Unknown", Reason::CoverageUnknown),
        ]);
        assert_eq!(told(Some(&new), &broken), [(true, "ImagePullFailed".into(), "Observe".into())]);
        let well = status(&[
            (Ready, "True", Reason::AsSpecified),
            (Progressing, "False", Reason::AsSpecified),
            (Degraded, "False", Reason::AsSpecified),
            (ExpertsCovered, "True", Reason::AsSpecified),
        ]);
        let news: Vec<String> = transitions(Some(&broken), &well).into_iter().map(|one| one.reason).collect();
        assert_eq!(news, ["Ready", "AsSpecified", "ExpertsCovered"]);
    }

    #[test]
    fn a_note_fits_an_event() {
        let mut after = status(&[(ConditionType::Degraded, "True", Reason::PodsCrashing)]);
        after.conditions[0].message = "ü".repeat(2000);
        let note = &transitions(None, &after)[0].note;
        assert!(note.len() <= MAX_NOTE && note.ends_with('…'), "{}", note.len());
    }
}
