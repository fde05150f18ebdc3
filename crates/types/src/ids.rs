//! Identifiers. Each is its own type, so that a logical expert is never taken for a slot.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A vocabulary entry. Plain integer: it is data, indexed and compared everywhere.
pub type TokenId = u32;

/// A position in a sequence, from 0. Plain integer for the same reason.
pub type Position = u32;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $label:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The id as an index into a slice.
            #[inline]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($label, " {}"), self.0)
            }
        }
    };
}

id!(
    /// A transformer layer, from 0. The MTP layers follow the main ones (`num_hidden_layers + i`).
    LayerId(u16), "layer");
id!(
    /// A routed expert of a layer as the gate names it, before any replication.
    LogicalExpert(u16), "expert");
id!(
    /// An expert shard of a model: its ordinal among `experts.shards`, stable across restarts.
    ShardIndex(u16), "shard");
id!(
    /// A place for one expert in one layer of one shard; counted per (shard, layer) from 0.
    SlotIndex(u16), "slot");
id!(
    /// The version of a placement. Epochs only grow; 0 is never used by a live cluster.
    PlacementEpoch(u64), "epoch");
id!(
    /// A page of the latent KV cache.
    PageId(u32), "page");
id!(
    /// A sequence inside one worker; never reused by that process.
    SequenceId(u64), "sequence");
