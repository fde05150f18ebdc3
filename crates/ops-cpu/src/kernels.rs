//! The arithmetic, written once over [`Lanes`](crate::lanes::Lanes).
//!
//! Kernels take raw pointers in argument structs because what they write (disjoint rows and columns of one
//! buffer, by several threads) cannot be said with slices. Each states what it reads and writes; the
//! [`backend`](crate::backend) validates shapes before it makes such a struct.

#![allow(
    clippy::needless_range_loop,
    reason = "register tiles are arrays indexed by row and panel in several operands at once"
)]

pub(crate) mod attention;
pub(crate) mod probe;
pub(crate) mod product;
pub(crate) mod rows;
