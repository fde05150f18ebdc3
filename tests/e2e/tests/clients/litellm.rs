//! litellm as a library.

use cadre_e2e::clients::Client;

use crate::{CLUSTER, FULL, passes, url};

#[test]
fn litellm() {
    passes(Client::python("litellm").script(), &[url(&CLUSTER), url(&FULL.cluster)]);
}
