//! The `MoETier` objects, through which tiers are scaled (ADR 11).
//!
//! `replicas` belongs to whoever scales. It is applied with the value that was seen, or with the model's where
//! that has changed; the resourceVersion that goes with it makes the write fail if somebody scaled meanwhile.

use cadre_k8s_api::{MoETier, MoETierSpec, Tier};

use super::{
    super::{ObjectKind, component::Component, facts::Facts, wants::Wants},
    Child, meta,
};

pub(super) fn tier(facts: &Facts<'_>, wants: &Wants, tier: Tier) -> Option<Child> {
    let asked = wants.of_tier(tier).asked;
    let spec = MoETierSpec {
        model_name: facts.name().to_owned(),
        tier,
        replicas: asked,
        declared_replicas: facts.spec().declared_replicas(tier),
    };
    let component = Component::Tier(tier);
    let name = tier.object_name(facts.name());
    let metadata = meta::metadata(facts, name, Some(component));
    Child::new(ObjectKind::Tier, Some(asked), &MoETier { metadata, spec, status: None })
}
