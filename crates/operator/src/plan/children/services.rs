//! Services: two for clients, one for members and the operator, one for the shards' stable names.
//!
//! The first two have endpoints only while the router is ready. The headless ones publish pods before they are
//! ready: members must find the router while it waits for them, and a name that resolves helps whoever looks
//! for a fault.

use cadre_k8s_api::{
    Tier,
    names::{self, port},
};
use k8s_openapi::{
    api::core::v1::{Service, ServicePort, ServiceSpec},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{
    super::{ObjectKind, component::Component, facts::Facts},
    Child, meta,
};

pub(super) fn all(facts: &Facts<'_>) -> [Option<Child>; 4] {
    let model = facts.name();
    let router = Component::Router;
    let experts = Component::Tier(Tier::Experts);
    [
        service(facts, names::grpc_service(model), router, ("grpc", port::GRPC, "kubernetes.io/h2c"), false),
        service(facts, names::http_service(model), router, ("http", port::HTTP, "http"), false),
        service(
            facts,
            names::coordinator_service(model),
            router,
            ("coordinator", port::COORDINATOR, "kubernetes.io/h2c"),
            true,
        ),
        service(
            facts,
            experts.object_name(model),
            experts,
            ("expert", port::EXPERT, "kubernetes.io/h2c"),
            true,
        ),
    ]
}

fn service(
    facts: &Facts<'_>,
    name: String,
    component: Component,
    (port, number, protocol): (&str, u16, &str),
    headless: bool,
) -> Option<Child> {
    let service = Service {
        metadata: meta::metadata(facts, name, Some(component)),
        spec: Some(ServiceSpec {
            cluster_ip: headless.then(|| "None".to_owned()),
            publish_not_ready_addresses: headless.then_some(true),
            selector: Some(meta::pod_labels(facts.name(), component)),
            ports: Some(vec![ServicePort {
                name: Some(port.to_owned()),
                port: number.into(),
                target_port: Some(IntOrString::String(port.to_owned())),
                protocol: Some("TCP".to_owned()),
                app_protocol: Some(protocol.to_owned()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    };
    Child::new(ObjectKind::Service, None, &service)
}
