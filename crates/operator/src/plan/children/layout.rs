//! The ConfigMap from which a router that starts without an operator learns the layout. While the operator's
//! stream is up its view counts; both say the same.

use std::collections::BTreeMap;

use cadre_k8s_api::names::{self, LAYOUT_KEY};
use k8s_openapi::api::core::v1::ConfigMap;

use super::{
    super::{ObjectKind, component::Component, facts::Facts, wants::Wants},
    Child, meta,
};

pub(super) fn config_map(facts: &Facts<'_>, wants: &Wants) -> Option<Child> {
    let layout = serde_json::to_string(&wants.layout()).ok()?;
    let map = ConfigMap {
        metadata: meta::metadata(facts, names::layout_config_map(facts.name()), Some(Component::Router)),
        data: Some(BTreeMap::from([(LAYOUT_KEY.to_owned(), layout)])),
        ..ConfigMap::default()
    };
    Child::new(ObjectKind::ConfigMap, None, &map)
}
