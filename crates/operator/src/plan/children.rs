//! The children of a model, as they are to be.
//!
//! Rendered from typed structures, so that a field that does not exist does not compile; compared and applied as
//! JSON. Nothing empty is rendered: the API server drops an empty map or string, and what it drops would look
//! like somebody's change for ever.

mod accounts;
mod budgets;
mod checkpoint;
mod experts;
mod layout;
mod meta;
mod network;
mod overlay;
mod pod;
mod router;
mod services;
mod spread;
mod tiers;
mod workers;

use cadre_k8s_api::{Reason, Tier, model::SourceRef, names::label, quantity};
use kube::core::DynamicObject;
use serde::Serialize;

use super::{ObjectKind, component::Component, facts::Facts, pace::Pace, wants::Wants};

/// One child as it is to be.
#[derive(Clone, Debug)]
pub(super) struct Child {
    pub(super) kind: ObjectKind,
    pub(super) name: String,
    pub(super) object: DynamicObject,
    /// Numbers that change without anything else: what an apply of them is called.
    pub(super) replicas: Option<i32>,
}

impl Child {
    /// `None` is impossible: everything rendered here is an object with metadata.
    fn new(kind: ObjectKind, replicas: Option<i32>, typed: &impl Serialize) -> Option<Self> {
        let mut object: DynamicObject = serde_json::from_value(serde_json::to_value(typed).ok()?).ok()?;
        let name = object.metadata.name.clone()?;
        meta::stamp(&mut object, kind);
        Some(Self { kind, name, object, replicas })
    }
}

/// All children, and what the spec has that no child can be made from.
#[derive(Clone, Debug, Default)]
pub(super) struct Rendered {
    /// In the order in which they are applied.
    pub(super) children: Vec<Child>,
    /// What is wrong with the spec in spite of admission, with the component that cannot be made.
    pub(super) faults: Vec<(Component, Reason, String)>,
    /// Hash of each component's pod template.
    templates: Vec<(Component, String)>,
    /// Hash of checkpoint and numerics.
    pub(super) checkpoint: String,
}

impl Rendered {
    /// Hash of a component's pod template, if it has one.
    pub(super) fn template(&self, component: Component) -> Option<&str> {
        self.templates.iter().find(|(of, _)| *of == component).map(|(_, hash)| hash.as_str())
    }

    /// Whether a pod of this component is made from another template than the one wanted.
    pub(super) fn is_outdated(&self, pod: &super::pods::OurPod<'_>) -> bool {
        self.template(pod.component).is_some_and(|wanted| pod.label(label::TEMPLATE_HASH) != Some(wanted))
    }

    /// Whether a pod reads another checkpoint, or computes otherwise, than the model is to.
    pub(super) fn is_of_another_checkpoint(&self, pod: &super::pods::OurPod<'_>) -> bool {
        pod.label(label::CHECKPOINT) != Some(&self.checkpoint)
    }
}

/// What children are made from.
struct Blueprint<'a> {
    facts: &'a Facts<'a>,
    pace: &'a Pace,
    image: &'a str,
    source: SourceRef<'a>,
    checkpoint: String,
}

/// Renders everything.
pub(super) fn render(facts: &Facts<'_>, wants: &Wants, pace: &Pace) -> Rendered {
    let mut rendered = Rendered::default();
    let mut children: Vec<Option<Child>> =
        Component::ALL.into_iter().map(|of| accounts::account(facts, of)).collect();
    children.push(layout::config_map(facts, wants));
    children.extend(network::policies(facts));
    children.extend(Tier::ALL.into_iter().map(|tier| tiers::tier(facts, wants, tier)));
    children.extend(Tier::ALL.into_iter().map(|tier| budgets::budget(facts, tier)));
    rendered.children = children.into_iter().flatten().collect();
    workloads(facts, pace, &mut rendered);
    // Before the workloads: their pods look for them. Their selector follows from the router's template.
    let services = services::all(facts, rendered.template(Component::Router));
    rendered.children.splice(0..0, services.into_iter().flatten());
    rendered
}

/// Router, workers and shards.
fn workloads(facts: &Facts<'_>, pace: &Pace, rendered: &mut Rendered) {
    let Some(source) = facts.spec().model.source.given() else {
        let message =
            "spec.model.source: give exactly one of image, persistentVolumeClaim, hostPath, imageVolume";
        rendered.faults =
            Component::ALL.map(|of| (of, Reason::InvalidConfiguration, message.to_owned())).to_vec();
        return;
    };
    let allowed = &facts.observed().allowed;
    if let Some(message) = allowed.refuses_model(facts.spec()) {
        rendered.faults = Component::ALL.map(|of| (of, Reason::NotAllowed, message.clone())).to_vec();
        return;
    }
    let image = facts.spec().image.as_deref().unwrap_or(&facts.observed().default_image);
    let checkpoint = checkpoint::hash(facts.spec());
    rendered.checkpoint.clone_from(&checkpoint);
    let blueprint = Blueprint { facts, pace, image, source, checkpoint };
    for component in Component::ALL {
        let refused = match component {
            Component::Router => allowed.refuses_router(facts.spec()),
            Component::Tier(tier) => allowed.refuses_tier(facts.spec(), tier),
        };
        if let Some(message) = refused {
            rendered.faults.push((component, Reason::NotAllowed, message));
            continue;
        }
        match component {
            Component::Router => rendered.add(component, router::deployment(&blueprint)),
            Component::Tier(tier) => match (tier, facts.spec().kv_cache(tier).map(quantity::units)) {
                (_, Some(Err(error))) => {
                    let field = if tier == Tier::Experts { "worker.kvCache" } else { "kvCache" };
                    let message = format!("spec.{}.{field}: {error}", tier.suffix());
                    rendered.faults.push((component, Reason::InvalidConfiguration, message));
                }
                (Tier::Experts, bytes) => {
                    let bytes = bytes.and_then(Result::ok);
                    rendered.add(component, experts::stateful_set(&blueprint, bytes));
                }
                (_, Some(Ok(bytes))) => {
                    rendered.add(component, workers::deployment(&blueprint, tier, bytes));
                }
                (_, None) => {}
            },
        }
    }
}

impl Rendered {
    fn add(&mut self, component: Component, workload: Option<(Child, String)>) {
        if let Some((child, template)) = workload {
            self.children.push(child);
            self.templates.push((component, template));
        }
    }
}

/// Hash of the checkpoint that pods are to have.
#[cfg(test)]
pub(super) fn checkpoint_of(observed: &crate::observed::Observed) -> String {
    checkpoint::hash(&observed.model.spec)
}
