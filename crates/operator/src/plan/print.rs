//! A plan for people: what `cadre operator plan` prints.

use std::fmt::Write as _;

use cadre_k8s_api::MoEModelStatus;
use cadre_types::OperatorView;

use super::{Action, Plan};

/// Why a plan cannot be printed as manifests.
#[derive(Debug, thiserror::Error)]
#[error("{object}: {problem}")]
pub struct PrintError {
    object: String,
    problem: String,
}

/// The plan in words: writes in order with their reasons, the state, what the coordinator is told.
pub fn render(plan: &Plan) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_actions(&mut text, &plan.actions);
    let _ = plan.status.as_ref().map_or(Ok(()), |status| write_status(&mut text, status));
    for (tier, status) in &plan.tier_status {
        let _ =
            writeln!(text, "status of tier {}: {} of {} ready", tier.suffix(), status.ready, status.desired);
    }
    for event in &plan.events {
        let kind = if event.warning { "Warning" } else { "Normal" };
        let _ = writeln!(text, "event: {kind} {}: {}", event.reason, event.note);
    }
    let _ = plan.operator_view.as_ref().map_or(Ok(()), |view| write_view(&mut text, view));
    if let Some(after) = plan.requeue {
        let _ = writeln!(text, "look again in {} s", after.as_secs_f64());
    }
    text
}

/// The applied objects as YAML, in order: `kubectl apply --server-side -f` would take them.
pub fn manifests(plan: &Plan) -> Result<String, PrintError> {
    let objects = plan.actions.iter().filter_map(|action| match action {
        Action::Apply { object, .. } => Some(object),
        Action::Delete { .. } | Action::SetRoutable { .. } => None,
    });
    let mut text = String::new();
    for object in objects {
        let failed = |problem: String| PrintError {
            object: object.metadata.name.clone().unwrap_or_default(),
            problem,
        };
        // By way of JSON: typed objects write their fields in the order of their schema, kind first.
        let value = serde_json::to_value(object).map_err(|error| failed(error.to_string()))?;
        let yaml = serde_saphyr::to_string(&value).map_err(|error| failed(error.to_string()))?;
        text.push_str("---\n");
        text.push_str(&yaml);
    }
    Ok(text)
}

fn write_actions(text: &mut String, actions: &[Action]) -> std::fmt::Result {
    if actions.is_empty() {
        return writeln!(text, "nothing to do");
    }
    for (number, action) in actions.iter().enumerate() {
        writeln!(text, "{:>3}. {}", number + 1, in_words(action))?;
    }
    Ok(())
}

fn in_words(action: &Action) -> String {
    match action {
        Action::Apply { object, why } => {
            let kind = object.types.as_ref().map(|types| types.kind.as_str()).unwrap_or_default();
            format!("apply {kind} {}: {why}", object.metadata.name.as_deref().unwrap_or_default())
        }
        Action::Delete { kind, name, force, why, .. } => {
            let how = if *force { "delete at once" } else { "delete" };
            format!("{how} {} {name}: {why}", kind.name())
        }
        Action::SetRoutable { pod, routable, message, .. } => {
            let what = if *routable { "routable" } else { "not routable" };
            format!("mark Pod {pod} {what}: {message}")
        }
    }
}

fn write_status(text: &mut String, status: &MoEModelStatus) -> std::fmt::Result {
    writeln!(text, "status:")?;
    for condition in &status.conditions {
        writeln!(
            text,
            "  {:<15} {:<8} {}: {}",
            condition.type_, condition.status, condition.reason, condition.message
        )?;
    }
    for (name, tier) in
        [("prefill", &status.prefill), ("decode", &status.decode), ("experts", &status.experts)]
    {
        if let Some(tier) = tier {
            writeln!(text, "  {name:<15} {}", tier.summary)?;
        }
    }
    Ok(())
}

fn write_view(text: &mut String, view: &OperatorView) -> std::fmt::Result {
    let layout = view.layout;
    let withdrawn = view.pods.iter().filter(|pod| pod.withdrawn).count();
    writeln!(
        text,
        "the coordinator is told: {} shards, {} redundant slots, at least {} copies; {} pods, {withdrawn} of them withdrawn",
        layout.shards,
        layout.redundant_slots,
        layout.min_copies,
        view.pods.len()
    )
}
