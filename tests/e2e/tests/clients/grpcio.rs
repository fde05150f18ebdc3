//! grpcio for Python, which knows the service by reflection (v1alpha) alone.

use cadre_e2e::clients::Client;

use crate::{CLUSTER, passes};

#[test]
fn grpcio() {
    passes(Client::python("grpc").script(), &[CLUSTER.grpc()]);
}
