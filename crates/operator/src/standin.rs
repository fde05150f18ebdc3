//! Stands in for the plan until it is there: plans nothing.

use std::convert::Infallible;

use cadre_k8s_api::MoEModel;

use crate::{observed::Observed, plan::Plan};

/// Nothing.
pub fn plan(_observed: &Observed) -> Plan {
    Plan {
        actions: Vec::new(),
        status: None,
        tier_status: Vec::new(),
        events: Vec::new(),
        operator_view: None,
        requeue: None,
    }
}

/// Nothing.
pub fn preview(_model: MoEModel, _default_image: &str) -> Plan {
    Plan {
        actions: Vec::new(),
        status: None,
        tier_status: Vec::new(),
        events: Vec::new(),
        operator_view: None,
        requeue: None,
    }
}

/// How many actions.
pub fn render(plan: &Plan) -> String {
    format!("{} actions\n", plan.actions.len())
}

/// None.
pub fn manifests(_plan: &Plan) -> Result<String, Infallible> {
    Ok(String::new())
}
