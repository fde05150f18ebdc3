//! langchain-openai.

use cadre_e2e::clients::Client;

use crate::{CLUSTER, FULL, passes, url};

#[test]
fn langchain() {
    passes(Client::python("langchain").script(), &[url(&CLUSTER), url(&FULL.cluster)]);
}
