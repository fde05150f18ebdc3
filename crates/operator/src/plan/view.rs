//! What the coordinator is told: the layout, and every pod there is.
//!
//! A pod is withdrawn from the moment that its deletion is asked for, or planned: workers choose other copies before
//! its process hears of it. A pod on a node that does not answer is not: nobody has told its process to stop, and
//! while it is reached it serves. With each pod goes its addresses: who says that it is this pod is there.

use cadre_types::{Layout, OperatorView, PodView};

use super::{facts::Facts, replace::Victim};

pub(super) fn view(facts: &Facts<'_>, layout: Layout, victims: &[Victim]) -> OperatorView {
    let mut pods: Vec<PodView> = facts
        .pods()
        .iter()
        .map(|pod| PodView {
            pod: pod.reference(),
            domain: facts.domain(pod).map(str::to_owned),
            withdrawn: victims.iter().any(|victim| victim.uid == pod.uid())
                || (pod.is_terminating() && !facts.is_on_silent_node(pod)),
            ips: pod.ips(),
        })
        .collect();
    pods.sort_by(|a, b| a.pod.uid.cmp(&b.pod.uid));
    OperatorView { layout, pods }
}
