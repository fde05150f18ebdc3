//! OpenAI's own client for Python.

use cadre_e2e::clients::Client;

use crate::{CLUSTER, FULL, passes, url};

#[test]
fn openai() {
    passes(Client::python("openai").script(), &[url(&CLUSTER), url(&FULL.cluster)]);
}
