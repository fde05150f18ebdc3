//! Services: two for clients, one for members and the operator, one for the shards' stable names.
//!
//! The first two have endpoints only while the router is ready. The headless ones publish pods before they are
//! ready: members must find the router while it waits for them, and a name that resolves helps whoever looks
//! for a fault.
//!
//! While a router is replaced two of them run. Clients reach whichever is ready; the coordinator's name leads to the
//! pods of one template only, or the members would be divided between two coordinators.

use std::collections::BTreeMap;

use cadre_k8s_api::{
    Tier,
    model::{ServiceType, TrafficPolicy},
    names::{self, label, port},
};
use k8s_openapi::{
    api::core::v1::{Service, ServicePort, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{
    super::{ObjectKind, component::Component, facts::Facts},
    Child, meta,
};

/// `template` is that of the wanted router.
pub(super) fn all(facts: &Facts<'_>, template: Option<&str>) -> [Option<Child>; 4] {
    let model = facts.name();
    let router = Component::Router;
    let experts = Component::Tier(Tier::Experts);
    [
        clients(facts, names::grpc_service(model), ("grpc", port::GRPC, "kubernetes.io/h2c")),
        clients(facts, names::http_service(model), ("http", port::HTTP, "http")),
        headless(
            facts,
            names::coordinator_service(model),
            router,
            ("coordinator", port::COORDINATOR, "kubernetes.io/h2c"),
            in_charge(facts, template),
        ),
        headless(
            facts,
            experts.object_name(model),
            experts,
            ("expert", port::EXPERT, "kubernetes.io/h2c"),
            None,
        ),
    ]
}

/// Template of the router whose coordinator is to be found: a newer one runs beside it for a while.
fn in_charge<'a>(facts: &'a Facts<'_>, template: Option<&'a str>) -> Option<&'a str> {
    facts.router_in_charge().and_then(|pod| pod.label(label::TEMPLATE_HASH)).or(template)
}

/// A Service that clients use.
fn clients(facts: &Facts<'_>, name: String, port: Port) -> Option<Child> {
    let given = &facts.spec().router.service;
    let outside = given.type_ != ServiceType::ClusterIP;
    let mut metadata = meta::metadata(facts, name, Some(Component::Router));
    metadata.annotations = (!given.annotations.is_empty()).then(|| given.annotations.clone());
    let spec = ServiceSpec {
        type_: Some(given.type_.name().to_owned()),
        load_balancer_class: given.load_balancer_class.clone(),
        // What an API server would set: the way back from a Local that was given is an apply.
        external_traffic_policy: outside
            .then(|| given.external_traffic_policy.unwrap_or(TrafficPolicy::Cluster).name().to_owned()),
        ..spec(meta::pod_labels(facts.name(), Component::Router), port)
    };
    let service = Service { metadata, spec: Some(spec), ..Service::default() };
    Child::new(ObjectKind::Service, None, &service)
}

/// A Service that is only a name, of pods that are not ready as well.
fn headless(
    facts: &Facts<'_>,
    name: String,
    component: Component,
    port: Port,
    template: Option<&str>,
) -> Option<Child> {
    let mut selector = meta::pod_labels(facts.name(), component);
    selector.extend(template.map(|hash| (label::TEMPLATE_HASH.to_owned(), hash.to_owned())));
    let spec = ServiceSpec {
        cluster_ip: Some("None".to_owned()),
        publish_not_ready_addresses: Some(true),
        ..spec(selector, port)
    };
    let metadata = meta::metadata(facts, name, Some(component));
    Child::new(ObjectKind::Service, None, &Service { metadata, spec: Some(spec), ..Service::default() })
}

/// Name, number and protocol.
type Port = (&'static str, u16, &'static str);

fn spec(selector: BTreeMap<String, String>, (name, number, protocol): Port) -> ServiceSpec {
    ServiceSpec {
        selector: Some(selector),
        ports: Some(vec![ServicePort {
            name: Some(name.to_owned()),
            port: number.into(),
            target_port: Some(IntOrString::String(name.to_owned())),
            protocol: Some("TCP".to_owned()),
            app_protocol: Some(protocol.to_owned()),
            ..ServicePort::default()
        }]),
        ..ServiceSpec::default()
    }
}
