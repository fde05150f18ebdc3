//! Carries a plan out: actions in order, then the tiers' status, then the model's.
//!
//! An action that is refused or meets a newer object does not stop the others, with one exception: after a failed apply
//! nothing is deleted. (A pod is deleted because it differs from what was just applied; if that was refused, its
//! replacement would be the same pod again, and again.) A server in trouble ends the pass: what comes next would fail
//! as well. Status is not written from an observation that proved stale.

use std::collections::BTreeMap;

use futures::{StreamExt, stream};
use kube::Client;

use super::{
    kinds,
    memory::{Memory, Target},
    queue::ModelKey,
    stores::Stores,
    verdict::{Verdict, judge},
};
use crate::{
    observed::Observed,
    plan::{Action, ObjectKind, Plan},
};

mod children;
mod gate;
mod status;

/// Pod actions in flight at one time: gates of three hundred shards are set within a second, and the API server's
/// priority levels are not filled.
const POD_ACTIONS: usize = 16;

/// What a pass works with.
pub(crate) struct Context<'a> {
    pub(crate) client: &'a Client,
    pub(crate) key: &'a ModelKey,
    pub(crate) stores: &'a Stores,
    pub(crate) observed: &'a Observed,
    /// The model's uid.
    pub(crate) uid: &'a str,
}

/// What an action did.
#[derive(Debug)]
pub(crate) enum Effect {
    /// The object has this version now.
    Version(Target, String),
    /// The object is on its way out, or gone.
    Leaving(Target, String),
    /// Somebody else's object has the name.
    Stranger(ObjectKind, Box<kube::core::DynamicObject>),
    /// The stores do not have a child of ours that is there: they are behind.
    Behind,
}

/// What came out of a pass.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    /// Writes that were made.
    pub(crate) written: usize,
    /// Writes that met a newer object.
    pub(crate) stale: bool,
    /// What was refused, by child.
    pub(crate) refused: BTreeMap<String, String>,
    /// Why it ended early.
    pub(crate) failure: Option<String>,
    /// The model or its namespace is gone.
    pub(crate) gone: bool,
    /// Something that was to be applied was not.
    pub(crate) unapplied: bool,
}

impl Pass {
    /// Everything was done.
    pub(crate) fn is_complete(&self) -> bool {
        !self.stale && self.refused.is_empty() && !self.is_over()
    }

    fn is_over(&self) -> bool {
        self.gone || self.failure.is_some()
    }
}

/// Carries out everything of the plan but its events.
pub(crate) async fn execute(context: &Context<'_>, plan: &Plan, memory: &mut Memory) -> Pass {
    let mut pass = Pass::default();
    for batch in batches(&plan.actions) {
        if pass.is_over() {
            break;
        }
        if pass.unapplied && batch.iter().any(|action| matches!(action, Action::Delete { .. })) {
            tracing::info!(model = %context.key, actions = batch.len(), "Deleted nothing after a failed apply");
            continue;
        }
        // Collected first: a closure in the stream would not be general enough for a task.
        let writes: Vec<_> = batch.iter().map(|action| carry_out(context, action)).collect();
        let mut results = stream::iter(writes).buffered(POD_ACTIONS).zip(stream::iter(batch));
        while let Some((result, action)) = results.next().await {
            record(context, memory, &mut pass, Subject::of(action), result);
        }
    }
    if !pass.stale {
        status::write(context, plan, memory, &mut pass).await;
    }
    if !pass.is_over() {
        // Of what was not attempted nothing new is known.
        memory.refused.clear();
    }
    memory.refused.extend(pass.refused.clone());
    pass
}

/// Actions on pods do not depend on each other and go side by side, where they follow each other; all else goes one by
/// one.
fn batches(actions: &[Action]) -> impl Iterator<Item = &[Action]> {
    actions.chunk_by(|a, b| {
        let class = |action: &Action| match action {
            Action::SetRoutable { .. } => Some(false),
            Action::Delete { kind: ObjectKind::Pod, .. } => Some(true),
            Action::Apply { .. } | Action::Delete { .. } => None,
        };
        class(a).is_some() && class(a) == class(b)
    })
}

async fn carry_out(context: &Context<'_>, action: &Action) -> Result<Effect, kube::Error> {
    match action {
        Action::Apply { object, why } => children::apply(context, object, why).await,
        Action::Delete { kind, name, uid, resource_version, force, why } => {
            let exactly =
                children::Exactly { uid, resource_version: resource_version.as_deref(), force: *force };
            children::delete(context, *kind, name, &exactly, why).await
        }
        Action::SetRoutable { pod, uid, routable, reason, message } => {
            gate::set_routable(context, pod, uid, &gate::Gate { routable: *routable, reason, message }).await
        }
    }
}

/// What an action is about, for messages and memory.
struct Subject {
    /// `Deployment demo-router`.
    name: String,
    /// It is an apply.
    applies: bool,
}

impl Subject {
    fn of(action: &Action) -> Self {
        let name = match action {
            Action::Apply { object, .. } => {
                let kind = object.types.as_ref().map_or("object", |types| types.kind.as_str());
                format!("{kind} {}", object.metadata.name.as_deref().unwrap_or_default())
            }
            Action::Delete { kind, name, .. } => kinds::child(*kind, name),
            Action::SetRoutable { pod, .. } => kinds::child(ObjectKind::Pod, pod),
        };
        Self { name, applies: matches!(action, Action::Apply { .. }) }
    }
}

fn record(
    context: &Context<'_>,
    memory: &mut Memory,
    pass: &mut Pass,
    subject: Subject,
    result: Result<Effect, kube::Error>,
) {
    let model = context.key;
    match result {
        Ok(Effect::Version(target, version)) => {
            pass.written += 1;
            memory.written.version(target, version);
        }
        Ok(Effect::Leaving(target, uid)) => {
            pass.written += 1;
            memory.written.leaving(target, uid);
        }
        Ok(Effect::Stranger(kind, object)) => {
            tracing::warn!(%model, object = subject.name, "An object of this name belongs to somebody else");
            memory.strangers.add(kind, *object);
            pass.stale = true;
            pass.unapplied = true;
        }
        Ok(Effect::Behind) => {
            pass.stale = true;
            pass.unapplied = true;
        }
        Err(error) => {
            pass.unapplied |= subject.applies;
            failed(context, memory, pass, subject, judge(&error));
        }
    }
}

fn failed(context: &Context<'_>, memory: &Memory, pass: &mut Pass, subject: Subject, verdict: Verdict) {
    let (model, object) = (context.key, subject.name);
    match verdict {
        Verdict::Conflict => {
            tracing::debug!(%model, object, "Met a newer object");
            pass.stale = true;
        }
        // Whatever was to be done to it: it is gone. An apply creates, so for it the kind is missing.
        Verdict::Missing if !subject.applies => pass.stale = true,
        Verdict::Missing => pass.failure = Some(format!("{object}: the API server does not know the kind")),
        Verdict::NamespaceGone => pass.gone = true,
        Verdict::Refused(message) => {
            if memory.refused.get(&object) != Some(&message) {
                tracing::warn!(%model, object, message, "The API server refused a write");
            }
            pass.refused.insert(object, message);
        }
        Verdict::Failed(message) => pass.failure = Some(format!("{object}: {message}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_actions_go_side_by_side_and_all_else_one_by_one() {
        let gate = || Action::SetRoutable {
            pod: "p".into(),
            uid: "u".into(),
            routable: true,
            reason: "R".into(),
            message: "m".into(),
        };
        let delete = |kind| Action::Delete {
            kind,
            name: "n".into(),
            uid: "u".into(),
            resource_version: None,
            force: false,
            why: "w".into(),
        };
        let actions = [
            delete(ObjectKind::Service),
            delete(ObjectKind::Service),
            gate(),
            gate(),
            gate(),
            delete(ObjectKind::Pod),
            delete(ObjectKind::Pod),
            delete(ObjectKind::Tier),
        ];
        let sizes: Vec<_> = batches(&actions).map(<[Action]>::len).collect();
        assert_eq!(sizes, [1, 1, 3, 2, 1]);
        assert_eq!(batches(&[]).count(), 0);
    }
}
